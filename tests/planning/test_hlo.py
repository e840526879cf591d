"""Parsing of compiled programs: handwritten texts, and loops compiled by XLA on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from condiff_jax.planning import hlo

# A loop of 3 in a loop of 5. Cycles: 100 + 5 (10 + 3 (1)); the fused 9 is part of the 10.
NESTED = """HloModule step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p, %p)
}

%unused (p.1: f32[4]) -> f32[4] {
  ROOT %fusion.9 = f32[4]{0} fusion(%p.1), calls=%fused, backend_config={"estimated_cycles":"7000"}
}

%inner_body (q: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} get-tuple-element(%q), index=1
  %fusion.1 = f32[4]{0} fusion(%x), calls=%fused, backend_config={"estimated_cycles":"1"}
}

%inner_condition (q.1: (s32[], f32[4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%outer_body (r: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.2 = f32[4]{0} fusion(%y), calls=%fused, backend_config={"estimated_cycles":"10"}
  %while.1 = (s32[], f32[4]) while(%t), condition=%inner_condition, body=%inner_body
}

%outer_condition (r.1: (s32[], f32[4])) -> pred[] {
  %limit.1 = s32[] constant(5)
  ROOT %lt.1 = pred[] compare(%j, %limit.1), direction=LT
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %fusion.3 = f32[4]{0} fusion(%a), calls=%fused, backend_config={"estimated_cycles":"100"}
  ROOT %while.2 = (s32[], f32[4]) while(%u), condition=%outer_condition, body=%outer_body, LOOP
}
"""


def entry(*lines, before=""):
    return before + "ENTRY %main (a: f32[4]) -> f32[4] {\n" + "\n".join(lines) + "\n}\n"


@pytest.mark.parametrize(
    "loop, expected",
    [
        ("", 100 + 5 * (10 + 3)),
        ('backend_config={"known_trip_count":{"n":"7"}}', 100 + 7 * (10 + 3)),
    ],
)
def test_cycles_of_nested_loops(loop, expected):
    assert hlo.cycles(hlo.executions(NESTED.replace("LOOP", loop))) == expected


@pytest.mark.parametrize(
    "old, new",
    [("constant(5)", "add(%j, %j)"), ("%j, %limit.1), direction=LT", "%j), direction=NE")],
)
def test_a_loop_of_unknown_length_counts_once(old, new):
    assert hlo.cycles(hlo.executions(NESTED.replace(old, new))) == 100 + 10 + 3


def test_every_branch_counts_as_taken():
    branches = "".join(
        f'%b{i} (p: f32[]) -> f32[] {{\n  %f{i} = f32[] fusion(%p), "estimated_cycles":"{i}"\n}}\n'
        for i in (3, 4)
    )
    line = "  %c = f32[] conditional(%i, %x, %y), branch_computations={%b3, %b4}"
    assert hlo.cycles(hlo.executions(entry(line, before=branches))) == 7


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.executions("HloModule nothing")


@pytest.mark.parametrize("length", [1, 6])
def test_loops_compiled_by_xla(length):
    """Each product in the body runs once per iteration; texts of the CPU have no cycles."""
    step = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
    shapes = jax.ShapeDtypeStruct((8, 8), "float32"), jax.ShapeDtypeStruct((6, 8, 8), "float32")
    function = lambda x, ws: jax.lax.scan(step, x, ws[:length])[0]  # noqa: E731
    text = jax.jit(function).lower(*shapes).compile().as_text()
    products = sum(run.times for run in hlo.executions(text) if " dot(" in run.line)
    assert products == length


@pytest.mark.parametrize(
    "shape, expected",
    [
        ("f32[]", [4]),
        ("bf16[28,1152]{1,0:T(8,128)(2,1)S(1)}", [2 * 28 * 1152]),
        ("(pred[8], u32[], s4[6], f8e4m3fn[3])", [8, 4, 3, 3]),
    ],
)
def test_bytes_of_shapes(shape, expected):
    assert hlo.sizes(shape) == expected


@pytest.mark.parametrize(
    "groups, expected",
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,8]<=[16]", 8),
        ("[8,2]<=[2,8]T(1,0)", 2),
        ("mesh['a'=8,'b'=4,'c'=2] {'a','c'}", 16),
        ("mesh['a'=8,'b'=4], device_ids=([8,4]T(1,0)) {'b'}", 4),
        ("mesh['a'=8,'b'=4] {'a':(2)4}", 4),
    ],
)
def test_group_sizes(groups, expected):
    assert hlo.group_size(f"all-gather(%x), replica_groups={groups}, dimensions={{0}}") == expected


S = 8 * 1024 * 4  # bytes of f32[8,1024], on 8 devices
GROUPS = "channel_id={}, replica_groups=[1,8]<=[8]"


@pytest.mark.parametrize(
    "instruction, sent",
    [
        ("f32[8,1024]{1,0} all-gather(%x)", {"all-gather": S * 7 // 8}),
        ("(f32[1,1024], f32[8,1024]) all-gather-start(%x)", {"all-gather": S * 7 // 8}),
        ("f32[8,1024] all-reduce(%x)", {"all-reduce": 2 * S * 7 // 8}),
        ("f32[8,1024] all-reduce-start(%x)", {"all-reduce": 2 * S * 7 // 8}),
        ("(f32[4,1024], f32[4,1024]) all-reduce(%x, %y)", {"all-reduce": 2 * S * 7 // 8}),
        ("f32[1,1024] reduce-scatter(%x)", {"reduce-scatter": S * 7 // 8}),
        ("f32[8,1024] all-to-all(%x)", {"all-to-all": S * 7 // 8}),
        ("f32[8,1024] collective-permute(%x)", {"collective-permute": S}),
        (
            "(f32[8,1024], f32[8,1024], u32[], u32[]) collective-permute-start(%x)",
            {"collective-permute": S},
        ),
        ("f32[8,1024] all-gather-done(%x)", {}),
        ("f32[8,1024] add(%all-reduce.1, %y)", {}),
    ],
)
def test_bytes_that_a_device_sends(instruction, sent):
    line = f"  %r = {instruction}, {GROUPS.format(1)}"
    assert hlo.collectives(hlo.executions(entry(line))) == sent


def test_asynchronous_collectives_count_once():
    lines = [f"  %r{c} = f32[8,1024] all-gather(%x), {GROUPS.format(c)}" for c in (1, 1, 2)]
    assert hlo.collectives(hlo.executions(entry(*lines))) == {"all-gather": 2 * S * 7 // 8}


def test_reduce_scatter_is_a_fusion_on_tpus():
    before = "%all-reduce-scatter.3 (p: f32[8,1024]) -> f32[1,1024] {\n"
    before += f"  %r = f32[8,1024] all-reduce(%p), {GROUPS.format(1)}\n}}\n"
    line = "  %f = f32[1,1024] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3"
    runs = hlo.executions(entry(line, before=before))
    assert hlo.collectives(runs) == {"reduce-scatter": S * 7 // 8}


def test_kernels_count_with_their_loops():
    call = '%k = f32[] custom-call(%x), custom_call_target="__cudnn$fmhaSoftmax"'
    text = NESTED.replace("  %x = f32[4]{0} get", f"  {call}\n  %x = f32[4]{{0}} get")
    assert hlo.custom_calls(hlo.executions(text)) == {"__cudnn$fmhaSoftmax": 15}
