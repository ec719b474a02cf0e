"""Laws of the plan: who computes what, and that what is sent is what is received."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from muonkit.distributed.machines import Machine, cheaper_repeated
from muonkit.distributed.owners import make_gather, make_own, make_plan
from muonkit.distributed.param_layout import Layout
from muonkit.distributed.placement import Axis, Placement, box_size, replicated, shard_over, whole
from muonkit.distributed.plan import Plan, StepPlan, Traffic, fingerprint
from muonkit.distributed.planner import GroupToPlan, ParamToPlan, plan_step, selected_lines
from muonkit.distributed.transfers import Direction, Matrix, PlannedTensor
from muonkit.selection import SELECTIONS

CAPS = [1, 300, 1 << 30]


@st.composite
def described(draw: st.DrawFn) -> tuple[int, list[PlannedTensor], list[Matrix]]:
    """Ranks, and parameters that they share: stacks of matrices, some with a stage's state, of some
    of which a step takes a fraction of the rows.
    """
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    positions = range(math.prod(mesh))
    keeps = draw(st.booleans())
    fraction, selection = draw(st.sampled_from([1.0, 0.3, 0.6])), draw(st.sampled_from(SELECTIONS))
    tensors: list[PlannedTensor] = []
    matrices: list[Matrix] = []
    for number in range(draw(st.integers(1, 4))):
        axes = tuple(
            Axis(draw(st.sampled_from([None, 0, 1, 2])), draw(st.sampled_from([1, 1, 2])))
            for _ in mesh
        )
        shape = tuple(draw(st.integers(1, 6)) for _ in range(3))
        stored = Placement(mesh, axes, positions)
        lives = shard_over(stored, shape, stored.copies()) if draw(st.booleans()) else stored
        copies = lives.copies()
        repeat = tuple(axis for axis in copies if draw(st.booleans()))
        tensor = PlannedTensor(f"parameter {number}", shape, stored, lives, repeat)
        if keeps:
            state = lives._replace(
                axes=tuple(Axis(None) if axis.dim == 2 else axis for axis in lives.axes)
            )
            tensor = tensor._replace(stage_shape=(*shape[:2], 1), stage_placement=state)
        tensors.append(tensor)
        for i in range(shape[0]):
            box = (i, i + 1), (0, shape[1]), (0, shape[2])
            kept = ((i, i + 1), (0, shape[1]), (0, 1)) if keeps else None
            rows = shape[1] <= shape[2]
            dims = (1,) if rows else (2,)
            lines = selected_lines(fraction, selection, dims, rows, box, shape, lives)
            flops = shape[1] ** 2 * shape[2]
            matrices.append(Matrix(number, box, flops, kept, lines if fraction < 1 else None))
    return len(positions), tensors, matrices


def covered(parts: Sequence[Any], box: Any) -> Counter[tuple[int, ...]]:
    """How often each entry of the box is in a part."""
    counts: Counter[tuple[int, ...]] = Counter()
    for part in parts:
        counts.update(itertools.product(*[range(a, b) for a, b in part]))
    return counts


@given(described(), st.sampled_from(CAPS))
def test_every_matrix_has_one_owner_in_every_repetition_who_stores_a_part(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    ranks, tensors, matrices = given_
    plan = make_plan(ranks, tensors, matrices, 4, cap)
    assert sorted(assignment.matrix for assignment in plan.assignments()) == list(
        range(len(matrices))
    )
    for matrix, owners in plan.assignments():
        tensor, box = tensors[matrices[matrix].tensor], matrices[matrix].box
        repetitions = math.prod(tensor.state_placement.mesh[axis] for axis in tensor.repeat)
        assert (
            len({tensor.state_placement.where(owner, tensor.repeat) for owner in owners})
            == repetitions
        )
        assert len(owners) == repetitions
        for owner in owners:
            way = Direction(
                tensor.state_placement, tensor.shape, box, tensor.state_placement.copies()
            )
            assert owner in [at for at, _ in way.others(owner)]


@given(described(), st.sampled_from(CAPS))
@settings(deadline=None)
def test_what_one_rank_sends_another_receives_in_the_same_order(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    plan = make_plan(*given_, 4, cap)
    for bucket in plan.buckets:
        states = (False, True) if plan.has_stage_state else (False,)
        for inward, state in itertools.product((True, False), states):
            way = plan.inbound if inward else plan.outbound
            rank_transfers = [way(bucket, me, state=state) for me in range(plan.ranks)]
            for me, other in itertools.product(range(plan.ranks), repeat=2):
                sent = [(m, box) for at, m, box in rank_transfers[me].sends if at == other]
                received = [(m, box) for at, m, box in rank_transfers[other].recvs if at == me]
                assert sent == received
            local = all(
                at == me for me, e in enumerate(rank_transfers) for at, _, _ in (*e.sends, *e.recvs)
            )
            assert plan.moves(bucket, inward, state) == (not local)


@given(described())
@settings(deadline=None)
def test_owners_get_all_of_a_matrix_and_parameters_all_of_the_result(
    given_: tuple[int, list[PlannedTensor], list[Matrix]],
) -> None:
    ranks, tensors, matrices = given_
    plan = make_plan(*given_, 4, 1 << 30)
    assignments = list(plan.assignments())
    for matrix, owners in assignments:
        number, box = matrices[matrix][:2]
        tensor = tensors[number]
        for owner in owners:
            parts = Direction(
                tensor.state_placement, tensor.shape, box, tensor.state_placement.copies()
            ).others(owner)
            assert covered([part for _, part in parts], box) == covered([box], box)
        # Every rank gets what it stores of the matrix, from exactly one owner.
        got = [
            (position, part)
            for owner in owners
            for position, part in Direction(
                tensor.param_placement, tensor.shape, box, tensor.repeat
            ).others(owner)
        ]
        for position in range(ranks):
            mine = tuple(part for at, part in got if at == position)
            assert mine == tensor.param_placement.parts(tensor.shape, position, box)


@given(described())
@settings(deadline=None)
def test_lines_travel_once_and_all_of_those_that_are_taken(
    given_: tuple[int, list[PlannedTensor], list[Matrix]],
) -> None:
    ranks, tensors, matrices = given_
    plan = make_plan(*given_, 4, 1 << 30)
    for matrix, owners in plan.assignments():
        planned = matrices[matrix]
        tensor = tensors[planned.tensor]
        taken = planned.taken(planned.box)
        if planned.lines is not None:
            dim = planned.lines.dims[0]
            whole = planned.lines.cells == ((0, planned.box[dim][1], planned.lines.total),)
            assert whole or planned.lines.sent == dim
        for owner in owners:
            way = Direction(
                tensor.state_placement, tensor.shape, planned.box, tensor.state_placement.copies()
            )
            parts = [planned.taken(part) for _, part in way.others(owner)]
            assert covered(parts, taken) == covered([taken], taken)
        for position in range(ranks):
            stored = tensor.param_placement.parts(tensor.shape, position, planned.box)
            parts = [planned.taken(part) for part in stored]
            assert covered(parts, taken) <= covered([taken], taken)


def counted(plan: Plan) -> Traffic:
    """What the rank_transfers of all ranks add up to."""
    total = Traffic(*([0] * plan.ranks for _ in Traffic._fields))
    for bucket in plan.buckets:
        for me in range(plan.ranks):
            total.sent_out[me] += (plan.ranks - 1) * plan.gathered_bytes(bucket)
            total.received_out[me] += (plan.ranks - 1) * plan.gathered_bytes(bucket)
            for way, transfers, itemsize in plan.rank_transfers(bucket, me):
                inward = way == "to_owners"
                sent = total.sent_in if inward else total.sent_out
                received = total.received_in if inward else total.received_out
                for column, some in ((sent, transfers.sends), (received, transfers.recvs)):
                    column[me] += sum(box_size(b) * itemsize for at, _, b in some if at != me)
        for matrix, owners in bucket:
            for owner in owners:
                total.flops[owner] += plan.matrices[matrix].flops
                total.matrices[owner] += plan.inward
                planned = plan.matrices[matrix]
                total.owned[owner] += box_size(planned.taken(planned.box)) * plan.inward
    return total


@given(described(), st.sampled_from(CAPS), st.sampled_from([2, 4]))
@settings(deadline=None)
def test_traffic_is_the_sum_of_the_transfers(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int, itemsize: int
) -> None:
    ranks, tensors, matrices = given_
    plain = [t._replace(stage_shape=(), stage_placement=None) for t in tensors]
    step = StepPlan(
        ranks,
        (
            make_plan(ranks, tensors, matrices, itemsize, cap),
            make_gather(ranks, plain, itemsize),
            make_gather(ranks, plain[:1], itemsize),
        ),
        (1, 1, 3),
    )
    for plan in step.plans:
        assert plan.traffic() == counted(plan)
    columns = zip(*(counted(step.plans[i]) for i in (0, 1, 2, 2, 2)), strict=True)
    sums = [list(map(sum, zip(*column, strict=True))) for column in columns]
    assert step.traffic() == Traffic(*sums)
    for me in range(ranks):
        sent = step.messages(me)
        assert sum(sent["to_owners"].values()) == step.traffic().sent_in[me]
        back = sum(sent["to_params"].values()) + sum(sent["adamw"].values())
        assert back == step.traffic().sent_out[me]
        assert all(me not in to for to in sent.values())


@given(described(), st.integers(1, 4))
@settings(deadline=None)
def test_between_nodes_is_what_crosses_them(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], node: int
) -> None:
    plan = make_plan(*given_, 4, 1 << 30)
    expected = {"to_owners": [0] * plan.ranks, "to_params": [0] * plan.ranks}
    for me in range(plan.ranks):
        for way, to in StepPlan(plan.ranks, (plan,), (1,)).messages(me).items():
            for at, size in to.items():
                if at // node != me // node:
                    expected[way][me] += size
    traffic = plan.traffic(node)
    assert traffic.sent_in == expected["to_owners"]
    assert traffic.sent_out == expected["to_params"]
    assert sum(traffic.received_in) == sum(traffic.sent_in)
    assert sum(traffic.received_out) == sum(traffic.sent_out)


@given(described(), st.sampled_from(CAPS))
def test_buckets_are_under_the_cap_or_one_matrix(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    plan = make_plan(*given_, 4, cap)
    for bucket in plan.buckets:
        assert bucket
        owned: Counter[int] = Counter()
        stored: Counter[int] = Counter()
        for matrix, owners in bucket:
            number, box = plan.matrices[matrix][:2]
            tensor = plan.tensors[number]
            for owner in owners:
                owned[owner] += box_size(box) * 4
                way = Direction(tensor.param_placement, tensor.shape, box, tensor.repeat)
                for at, part in way.others(owner):
                    stored[at] += box_size(part) * 4
        assert len(bucket) == 1 or max([*owned.values(), *stored.values()]) <= cap


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9))
def test_the_largest_load_is_at_most_the_mean_and_the_largest_job(
    costs: list[int], ranks: int
) -> None:
    at = replicated(ranks)
    tensors = [PlannedTensor(str(i), (1, 1), at, at) for i in range(len(costs))]
    matrices = [Matrix(i, ((0, 1), (0, 1)), cost) for i, cost in enumerate(costs)]
    loads = [0] * ranks
    traffic = make_plan(ranks, tensors, matrices, 4, 1 << 30, loads).traffic()
    assert traffic.flops == loads
    assert sum(loads) == sum(costs)
    assert max(loads) <= sum(costs) / ranks + max(costs)
    # Graham 1969: longest first is within 4/3 of the best, which is no less than either of these.
    best = max(sum(costs) / ranks, max(costs))
    if len(costs) > ranks:
        best = max(best, sum(sorted(costs, reverse=True)[ranks - 1 : ranks + 1]))
    assert max(loads) <= (4 / 3 - 1 / (3 * ranks)) * _optimum(costs, ranks) + 1e-9 or (
        len(costs) > 8
    )
    assert max(loads) >= best


def _optimum(costs: list[int], ranks: int) -> float:
    """The least largest load, by trying everything; not for more than eight."""
    if len(costs) > 8:
        return math.inf
    best = math.inf
    loads = [0] * ranks

    def deal(i: int) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if i == len(costs):
            best = max(loads)
            return
        for rank in {load: rank for rank, load in enumerate(loads)}.values():
            loads[rank] += costs[i]
            deal(i + 1)
            loads[rank] -= costs[i]

    deal(0)
    return best


def test_what_others_have_to_do_already_is_counted() -> None:
    at = replicated(2)
    loads = [10, 0]
    tensors = [PlannedTensor(name, (1, 1), at, at) for name in "abc"]
    plan = make_plan(2, tensors, [Matrix(i, ((0, 1), (0, 1)), 4) for i in range(3)], 4, 99, loads)
    assert [assignment.owners for assignment in plan.assignments()] == [(1,), (1,), (1,)]
    assert loads == [10, 12]


def test_equal_loads_go_to_the_lowest_position_in_the_order_given() -> None:
    at = replicated(3)
    tensors = [PlannedTensor(str(i), (1, 1), at, at) for i in range(6)]
    plan = make_plan(3, tensors, [Matrix(i, ((0, 1), (0, 1)), 7) for i in range(6)], 4, 1 << 20)
    assert [(assignment.matrix, *assignment.owners) for assignment in plan.assignments()] == [
        (0, 0), (1, 1), (2, 2), (3, 0), (4, 1), (5, 2),
    ]  # fmt: skip


@given(described(), st.sampled_from(CAPS))
def test_equal_input_makes_equal_plans_and_other_input_does_not(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    ranks, tensors, matrices = given_
    plan, again = (make_plan(ranks, list(tensors), list(matrices), 4, cap) for _ in range(2))
    assert plan == again
    assert fingerprint([plan]) == fingerprint([again])
    wider = make_plan(ranks, tensors, matrices, 2, cap)
    assert fingerprint([plan]) != fingerprint([wider])
    dearer = [matrices[0]._replace(flops=matrices[0].flops + 1), *matrices[1:]]
    other = make_plan(ranks, tensors, dearer, 4, cap)
    assert fingerprint([plan]) != fingerprint([other])


@given(described(), st.integers(1, 4), st.sampled_from(CAPS))
@settings(deadline=None)
def test_a_result_enters_every_node_once_and_reaches_all_who_store_it(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], node: int, cap: int
) -> None:
    plan = make_plan(*given_, 4, cap, node=node)
    assume(plan.several_nodes)
    for bucket in plan.buckets:
        for state in (False, True) if plan.has_stage_state else (False,):
            rounds = [
                [plan.outbound(bucket, me, late=late, state=state) for me in range(plan.ranks)]
                for late in (False, True)
            ]
            has: Counter[Any] = Counter()
            enters: Counter[Any] = Counter()
            for number, transfers in enumerate(rounds):
                for me, other in itertools.product(range(plan.ranks), repeat=2):
                    sent = [(m, box) for at, m, box in transfers[me].sends if at == other]
                    assert sent == [(m, b) for at, m, b in transfers[other].recvs if at == me]
                    has.update((other, m, box) for m, box in sent)
                    if me // node != other // node:
                        assert not (number and sent), "relays send within their node"
                        enters.update((other // node, me, m, box) for m, box in sent)
                    assert not number or all(has[me, m, box] for m, box in sent), "not yet there"
            assert all(count == 1 for count in enters.values())
            assert set(has.values()) <= {1}
            stored = {
                (at, matrix, box)
                for matrix, owners in bucket
                for owner in owners
                for at, box in plan.direction(matrix, False, state).others(owner)
            }
            assert set(has) == stored
            late = any(sends or recvs for sends, recvs in rounds[1])
            assert plan.relays(bucket, state) == late
            for number, transfers in enumerate(rounds):
                chunks = plan.chunks(bucket, cap, state, late=bool(number))
                size = 4 * max(
                    sum(
                        # Of a matrix some lines travel, where those are taken; a state does whole.
                        box_size(box if state else plan.matrices[matrix].taken(box))
                        for at, matrix, box in sends
                        if at != me
                    )
                    for me, (sends, _) in enumerate(transfers)
                )
                assert size <= chunks * cap or chunks == plan.ranks - 1
    assert plan.traffic() == counted(plan)
    crossing = [0] * plan.ranks
    for me in range(plan.ranks):
        for at, size in StepPlan(plan.ranks, (plan,), (1,)).messages(me)["to_params"].items():
            crossing[me] += size * (at // node != me // node)
    assert plan.traffic(node).sent_out == crossing
    assert sum(plan.traffic(node).received_out) == sum(crossing)


def test_two_nodes_of_two_by_hand() -> None:
    """Rank 1 owns one matrix of 6 elements: node 1 gets it once, by its second rank."""
    at = replicated(4)
    tensors = [PlannedTensor("w", (2, 3), at, at)]
    loads = [1, 0, 1, 1]
    plan = make_plan(4, tensors, [Matrix(0, ((0, 2), (0, 3)), 1)], 4, 99, loads, node=2)
    assert [assignment.owners for assignment in plan.assignments()] == [(1,)]
    assert plan.traffic().sent_out == [0, 48, 0, 24]
    assert plan.traffic().received_out == [24, 0, 24, 24]
    assert plan.traffic(2).sent_out == [0, 24, 0, 0]
    assert plan.traffic(2).received_out == [0, 0, 0, 24]


def test_what_all_ranks_get_is_gathered_unless_one_has_much_more_than_others() -> None:
    at = replicated(4)
    whole_node = [PlannedTensor(str(i), (2, 3), at, at) for i in range(5)]

    def gathered(count: int, ranks: int = 4, node: int = 0) -> int:
        matrices = [Matrix(i, ((0, 2), (0, 3)), 1) for i in range(count)]
        tensors = whole_node[:count]
        if ranks == 2:
            two = replicated(2)
            tensors = [t._replace(param_placement=two, state_placement=two) for t in tensors]
        plan = make_plan(ranks, tensors, matrices, 4, 1 << 20, node=node)
        return plan.gathers(plan.buckets[0])

    assert gathered(4) == 6
    assert gathered(5) == 0, "8 parts of 6 elements for 5"
    assert gathered(2, ranks=2) == 0
    assert gathered(4, node=2) == 0
    cut = Placement((4,), (Axis(0),), range(4))
    rows = [t._replace(param_placement=cut, state_placement=cut) for t in whole_node[:4]]
    plan = make_plan(4, rows, [Matrix(i, ((0, 2), (0, 3)), 1) for i in range(4)], 4, 1 << 20)
    assert plan.gathers(plan.buckets[0]) == 0
    plan = make_plan(4, whole_node[:4], list(plan.matrices), 4, 1 << 20)
    assert plan.traffic().sent_out == plan.traffic().received_out == [72] * 4


@given(described())
@settings(deadline=None)
def test_a_gather_brings_every_rank_what_it_stores(
    given_: tuple[int, list[PlannedTensor], list[Matrix]],
) -> None:
    ranks, tensors, _ = given_
    tensors = [t._replace(stage_shape=(), stage_placement=None) for t in tensors]
    plan = make_gather(ranks, tensors, 4)
    for number, tensor in enumerate(tensors):
        for me in range(ranks):
            parts = [
                box
                for bucket in plan.buckets
                for _, matrix, box in plan.outbound(bucket, me).recvs
                if plan.matrices[matrix].tensor == number
            ]
            own = tensor.param_placement.parts(tensor.shape, me, whole(tensor.shape))
            assert covered(parts, whole(tensor.shape)) == covered(own, whole(tensor.shape))


@given(described())
def test_what_is_whole_where_it_lies_never_moves(
    given_: tuple[int, list[PlannedTensor], list[Matrix]],
) -> None:
    ranks, tensors, matrices = given_
    whole_ones = [
        t for t in tensors if all(axis.dim in (None, 0) for axis in t.state_placement.axes)
    ]
    assume(whole_ones)
    alone = [t._replace(param_placement=t.state_placement, repeat=()) for t in whole_ones]
    own = [
        m._replace(tensor=whole_ones.index(tensors[m.tensor]))
        for m in matrices
        if tensors[m.tensor] in whole_ones
    ]
    loads = [0] * ranks
    plan = make_own(ranks, alone, own, loads)
    traffic = plan.traffic()
    assert traffic.flops == loads
    assert not any((*traffic.sent_in, *traffic.sent_out, *traffic.received_in))
    for matrix, owners in plan.assignments():
        tensor, box = alone[own[matrix].tensor], own[matrix].box
        has = [p for p in range(ranks) if tensor.state_placement.parts(tensor.shape, p, box)]
        assert sorted(owners) == has


def test_repeated_where_links_are_slow_and_shared_out_where_products_are() -> None:
    """Two copies of two shards, worked out by hand: 4 ranks, 1 s each of products and of bytes."""
    stored = Placement((2, 2), (Axis(None), Axis(0)), range(4))
    # Again: 1/2 of the products, 2 * 1/4 of the bytes. Shared out: 1/4, and 1/8 + 3/8 of them.
    equal = Machine(flops=1.0, intra=1.0, inter=1.0, node=4)
    assert not cheaper_repeated(equal, stored, (0,), flops=1, size=1)
    slow_links = Machine(flops=1e9, intra=1.0, inter=0.1, node=2)
    assert cheaper_repeated(slow_links, stored, (0,), flops=1, size=1)
    # Four copies on two nodes, 1 s of products again; shared out 1/4, and of the bytes 3/4 arrive,
    # one half of them from the other node.
    copies = replicated(4)
    for inter, again in ((0.6, False), (0.4, True)):
        rates = Machine(flops=1.0, intra=1e9, inter=inter, node=2)
        assert cheaper_repeated(rates, copies, (0,), flops=1, size=1) is again


@given(described(), st.sampled_from(CAPS))
def test_an_owner_sends_no_more_than_the_cap_in_a_chunk(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    """Nor are there more chunks than that needs; the most are one for every other rank."""
    ranks, tensors, matrices = given_
    plan = make_plan(ranks, tensors, matrices, 4, cap)
    for bucket in plan.buckets:
        chunks, most = plan.chunks(bucket, cap), max(ranks - 1, 1)
        sent = [
            sum(box_size(box) * 4 for at, _, box in plan.outbound(bucket, me).sends if at != me)
            for me in range(ranks)
        ]
        assert max(sent) <= chunks * cap or chunks == most
        assert chunks == 1 or max(sent) > (chunks - 1) * cap


def test_what_adamw_exchanges_together_is_under_the_cap() -> None:
    """Three parameters of which each of two ranks sends 100 bytes to the other."""
    stored = Placement((2,), (Axis(None),), range(2))
    lives = shard_over(stored, (10, 5), stored.copies())
    tensors = [PlannedTensor(f"parameter {i}", (10, 5), stored, lives) for i in range(3)]
    together = {
        cap: [
            len({plan.matrices[assignment.matrix].tensor for assignment in bucket})
            for bucket in plan.buckets
        ]
        for cap in (100, 250, 300)
        for plan in [make_gather(2, tensors, 4, cap)]
    }
    assert together == {100: [1, 1, 1], 250: [2, 1], 300: [3]}


@given(described(), st.sampled_from(CAPS))
def test_transfers_are_in_order_of_positions(
    given_: tuple[int, list[PlannedTensor], list[Matrix]], cap: int
) -> None:
    """Buffers are cut by it, on both sides."""
    ranks, tensors, matrices = given_
    plan = make_plan(ranks, tensors, matrices, 4, cap)
    for bucket, me in itertools.product(plan.buckets, range(ranks)):
        for way, (sends, recvs), _ in plan.rank_transfers(bucket, me):
            for transfers in (sends, recvs):
                positions = [transfer.position for transfer in transfers]
                assert positions == sorted(positions), way


def test_the_planner_divides_or_repeats_by_what_the_groups_matrices_cost() -> None:
    """HSDP, two copies of two shards: products from cheap to dear, a node for each copy."""
    placement = Placement((2, 2), (Axis(None), Axis(0)), range(4))
    params = {i: ParamToPlan(str(i), (8, 6), Layout(placement, placement)) for i in range(3)}
    rates = Machine(flops=1e9, intra=1e8, inter=1e6, node=2)
    chosen = set()
    for flops in (10**k for k in range(8)):
        group = GroupToPlan(params, "matrix", lambda *_, each=flops: each, 1 << 20)
        _, (planned,) = plan_step([group], rates, 4)
        repeats = {tensor.repeat for tensor in planned.shared[0].plan.tensors}
        repeated = cheaper_repeated(rates, placement, (0,), 3 * flops, 3 * 8 * 6 * 4)
        assert repeats == ({(0,)} if repeated else {()})
        chosen |= repeats
    assert chosen == {(0,), ()}
