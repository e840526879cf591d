# shellcheck shell=bash
# The compiler's flags, sourced by all other scripts with the platform, gpu or tpu:
#
#   . launch/xla_flags.sh gpu
#
# What XLA_FLAGS and LIBTPU_INIT_ARGS hold already comes last, and the last of two values wins.

case ${1:-} in
  gpu)
    flags=(
      # cuBLAS for all products. XLA's Triton kernels find no tiling for the projections to heads of 72
      # (XL sizes): compiled for an H100 ahead of time, jax 0.10.2 stops with an error.
      --xla_gpu_enable_triton_gemm=false
    )
    export XLA_FLAGS="${flags[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
    # JAX takes three quarters of the memory if it is not told otherwise.
    if [[ -z ${XLA_PYTHON_CLIENT_MEM_FRACTION:-} ]]; then # its name before, an error beside the new one
      export XLA_CLIENT_MEM_FRACTION="${XLA_CLIENT_MEM_FRACTION:-0.9}"
    fi
    ;;
  tpu)
    flags=(
      # Under fsdp, gathers a layer's parameters whole. Otherwise XLA turns the larger products into
      # loops that pass pieces round a ring.
      --xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000
    )
    export LIBTPU_INIT_ARGS="${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
    ;;
  *)
    echo "error: xla_flags.sh: the platform is '${1:-}'; give gpu or tpu" >&2
    exit 2
    ;;
esac
