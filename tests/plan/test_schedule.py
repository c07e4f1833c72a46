import pytest

from llama_jax.plan import schedule
from llama_jax.plan.schedule import Collective, Event, KernelWork, Traffic


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['axis_0'=16,'axis_1'=4], device_ids=([4,16]T(1,0)) {'axis_0'}, dimensions={1}", 16),
        ("mesh['axis_0'=16,'axis_1'=4] {'axis_0','axis_1'}, use_global", 64),
        ("{{0,16,32,48},{1,17,33,49}}, use_global_device_ids=true", 4),
        ("[4,16]<=[64], use_global_device_ids=true", 16),
    ],
)
def test_group_size_parses_every_notation_of_xla(groups, size):
    assert schedule.group_size(groups) == size


GROUPS = "channel_id={}, replica_groups=[4,16]<=[64], use_global_device_ids=true"
PROGRAM = f"""\
%fused.1 (p: bf16[4,256]) -> bf16[64,256] {{
  %all-gather.1 = bf16[64,256]{{1,0}} all-gather(%p), {GROUPS.format(7)}
}}
%offloaded (p: f32[64,256]) -> f32[4,256] {{
  %r.1 = f32[4,256]{{1,0}} reduce-scatter(%p), {GROUPS.format(1)}, to_apply=%add
}}, execution_thread="sparsecore"
%body (p: s32[]) -> s32[] {{
  %start = ((f32[64,256], token[]), f32[4,256]) call-start(%p), to_apply=%offloaded
  %product.1 = f32[8] fusion(%p), kind=kLoop, calls=%none, backend={{"estimated_cycles":"10"}}
  %done = f32[4,256] call-done(%start)
}}
%condition (p: s32[]) -> pred[] {{
  %most = s32[]{{:T(128)}} constant(3)
  ROOT %less = pred[] compare(%p, %most), direction=LT
}}
ENTRY %main (p: f32[64,256]) -> f32[4,256] {{
  %first = bf16[64,256] fusion(%p), kind=kLoop, calls=%fused.1, b={{"estimated_cycles":"5"}}
  %product.2 = f32[8] fusion(%p), kind=kLoop, calls=%none, b={{"estimated_cycles":"6"}}
  %last = bf16[64,256] fusion(%p), kind=kLoop, calls=%fused.1, b={{"estimated_cycles":"7"}}
  %loop = s32[] while(%last), condition=%condition, body=%body
  %kernel = bf16[8] custom-call(%p), c={{"cost_estimate":{{"flops":"9","bytes_accessed":"70"}}}}
  ROOT %sum = f32[64,256]{{1,0}} all-reduce(%p), {GROUPS.format(2)}, to_apply=%add
}}
"""
GATHER = Collective("all-gather", 64 * 256 * 2 * 15 / 16, 16)
SCATTER = Collective("reduce-scatter", 64 * 256 * 4 * 15 / 16, 16)
SUM = Collective("all-reduce", 2 * 64 * 256 * 4 * 15 / 16, 16)


def test_parse_events_repeats_loops_and_orders_overlapping_collectives():
    """An all-gather overlaps three products; each of three reduce-scatters one; a sum none."""
    iteration = [Event(starts=SCATTER, key="start"), Event(cycles=10), Event(key="start")]
    assert [event for event in schedule.parse_events(PROGRAM) if event != Event()] == [
        Event(starts=GATHER, key="7"), Event(cycles=5), Event(cycles=6), Event(cycles=7),
        Event(key="7"),
        *iteration * 3, Event(kernel=KernelWork(9, 70)),
        Event(starts=SUM, key="sum"), Event(key="sum"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gather", "scatter", "exposed"),
    [
        (18, 10, (0, 0)),  # as long as the computation that overlaps it
        (20, 11, (2, 3)),  # longer: by 2 once, by 1 three times
    ],
)
def test_communication_longer_than_the_computation_it_overlaps_is_exposed(gather, scatter, exposed):
    durations = {"all-gather": gather, "reduce-scatter": scatter, "all-reduce": 4}
    found = schedule.simulate_traffic(
        schedule.parse_events(PROGRAM), 1.0, lambda collective: durations[collective.kind]
    )
    assert found == {
        "all-gather": Traffic(bytes=GATHER.bytes, seconds=gather, exposed=exposed[0]),
        "reduce-scatter": Traffic(bytes=3 * SCATTER.bytes, seconds=3 * scatter, exposed=exposed[1]),
        "all-reduce": Traffic(bytes=SUM.bytes, seconds=4, exposed=4),
    }


def test_the_network_runs_one_collective_after_the_other():
    events = [
        Event(starts=GATHER, key="a"), Event(starts=GATHER, key="b"),
        Event(cycles=5), Event(key="a"), Event(key="b"),
    ]  # fmt: skip
    assert schedule.simulate_traffic(events, 1.0, lambda _: 4.0)["all-gather"].exposed == 3
