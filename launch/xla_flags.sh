# shellcheck shell=bash
# Compiler flags, sourced by all other scripts with the platform, gpu or tpu:
#
#   . launch/xla_flags.sh gpu
#
# Existing flags in XLA_FLAGS and LIBTPU_INIT_ARGS come last, and the last value of a flag wins.

case ${1:-} in
  gpu)
    flags=(
      # cuBLAS for all matrix products. XLA's Triton kernels have no tiling for heads of 72 channels
      # (XL sizes): ahead-of-time compilation for an H100 fails with an error in jax 0.10.2.
      --xla_gpu_enable_triton_gemm=false
    )
    export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
    # JAX's default is three quarters of the memory.
    if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then # its old name; JAX fails if both are set
      export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
    fi
    ;;
  tpu)
    flags=(
      # With FSDP, gather a layer's parameters at once. Otherwise XLA turns larger products into loops
      # that pass pieces around a ring.
      --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
    )
    export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    ;;
  *)
    echo "error: xla_flags.sh: the platform is '${1:-}'; give gpu or tpu" >&2
    exit 2
    ;;
esac
