"""Seeded mutants of the C files. The checks against the definition must reject each of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from attention_cases import Errors, Spec, draw, errors_against_oracle, worst_row
from kernel_cases import check_bucket_edges, poisoned_memory
from native_marks import copied, mutated, needs_compiler
from state_cases import Spec as StateSpec
from state_cases import draw as draw_states

from hstu_xd.model import step_memory
from hstu_xd.ops import first_use
from hstu_xd.ops.domain_attention import native as domain_native
from hstu_xd.ops.first_use import KernelUse
from hstu_xd.ops.state_attention import native as state_native

pytestmark = [needs_compiler, pytest.mark.slow]

# More keys than a stretch, more queries than a block, a domain that a target view never finds.
ATTENTION = [
    Spec((0, 1, 2, 200, 17), 3, dqk=6, dv=5, visited=2, target_view=target, biased=biased)
    for target in (False, True)
    for biased in (True, False)
]
# Few domains, and so many that vectors of slots hold initial states alone.
STATES = [
    *(StateSpec((9, 0, 30, 1), 4, 3, visited=3, biased=biased) for biased in (True, False)),
    StateSpec((40, 3), 40, 2, visited=20),
]


def attention() -> None:
    for spec in ATTENTION:
        run = domain_native.native_domain_attention
        with poisoned_memory():
            errors_against_oracle(run, draw(spec), torch.float32).check()


def states() -> None:
    for spec in STATES:
        case = draw_states(spec)
        leaves = case.leaves(torch.float32)
        with poisoned_memory():
            out = state_native.native_state_attention(**leaves, reads=case.reads())
            found, mass = case.with_gradients(out, leaves), case.mass()
        rows = {
            name: worst_row(found[name], x.numpy(), mass[name].numpy() if name in mass else None)
            for name, x in case.by_definition().items()
        }
        Errors(rows.pop("out"), rows).check()


def asked() -> None:
    """A third of the tokens as queries, so that no number of a query is that of its key."""
    case = draw(ATTENTION[0])
    leaves, grouping = case.tensors(torch.float32), case.grouping()
    some = grouping.asking(torch.arange(0, grouping.num_tokens, 3))
    sides = {"q": some, "k": some.keys, "v": some.keys}
    with poisoned_memory(), torch.no_grad():
        out = domain_native.native_domain_attention(
            *(side.of_tokens(leaves[name]) for name, side in sides.items()),
            some,
            norm_length=case.norm_length,
            bias=case.relative_bias(leaves),
        )
    Errors(worst_row(out, case.oracle.out[::3], None), {}).check()


def new_rows() -> None:
    for heads, dqk, dv in ((4, 16, 16), (3, 5, 7)):
        cpu = torch.device("cpu")
        use = KernelUse("new_rows", cpu, torch.float32, heads, dqk, dv, True, "native")
        problem = first_use._try(use, step_memory._trial)
        assert problem is None, f"error: {problem}"


def edges() -> None:
    # The net of the first use is not what is tested here.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_use, "_problem", lambda *given: None)
        check_bucket_edges("native")


# Name: file, text, what stands there instead, the check that is to see it.
Check = Callable[[], None]
MUTANTS: dict[str, tuple[str, str, str, Check]] = {}


def domain(name: str, text: str, instead: str, check: Check = attention) -> None:
    MUTANTS[name] = "domain_attention/native.c", text, instead, check


def state(name: str, text: str, instead: str) -> None:
    MUTANTS[name] = "state_attention/native.c", text, instead, states


def new_row(name: str, text: str, instead: str) -> None:
    MUTANTS[name] = "new_rows/native.c", text, instead, new_rows


def both(name: str, text: str, instead: str, check: Check = attention) -> None:
    MUTANTS[name] = "vectors.h", text, instead, check


domain("strictly_causal", "[before]] <= place)", "[before]] < place)")
domain("unseen_keys_weigh", "splat_int(seen[r0 + r]), weight)", "splat_int(most), weight)")
domain(
    "unseen_keys_have_gradients",
    "store(&slopes[r][j], keep(mask, slope))",
    "store(&slopes[r][j], slope)",
)
both(
    "one_of_many_rows_lost",
    "for (int64_t j = 0; j < n; j++) {\n            const floats row",
    "for (int64_t j = 0; j < n - (n == 64); j++) {\n            const floats row",
)
domain(
    "second_stretch_starts_early",
    "values + start * group->dv",
    "values + (start ? start - 1 : 0) * group->dv",
)
domain(
    "positions_shifted",
    "a->max_length - 1 - a->query_positions[token]",
    "a->max_length - 2 - a->query_positions[token]",
)
domain(
    "table_gradients_shifted",
    "a->max_length - 1 - a->query_positions[group->queries[first + r]]",
    "a->max_length - a->query_positions[group->queries[first + r]]",
)
domain(
    "time_of_the_query_itself",
    "const int64_t time = a->next_timestamps[token]",
    "const int64_t time = a->timestamps[token]",
)
domain(
    "not_divided", "totals[r * group->dv + c] / (float)a->norm_length", "totals[r * group->dv + c]"
)
domain("gradient_not_divided", "grads[i] /= (float)a->norm_length", "grads[i] /= 1")
domain("slope_of_silu", "(gate + weight * (splat(1.0f) - gate))", "(gate + weight * gate)")
domain(
    "second_head_reads_the_first_values",
    "group->rows + head * group->wide * group->dv",
    "group->rows",
)
domain(
    "bias_gradient_of_the_last_head_alone",
    "store(dbias + j, load(dbias + j) + keep(mask, slope))",
    "store(dbias + j, keep(mask, slope))",
)
domain("odd_keys_lose_their_times", "i < SUMS * buckets; i++", "i < SUMS * buckets; i += 2")
state(
    "odd_slots_lose_their_ages",
    "i < PIECES * table * SUMS; i++",
    "i < PIECES * table * SUMS; i += 2",
)
domain(
    "last_block_lost",
    "first < group->num_queries; first += BLOCK",
    "first + BLOCK <= group->num_queries || !first; first += BLOCK",
)
domain(
    "nothing_written_for_empty_groups",
    "    clear_rows(backward ? a->dq",
    "    if (0) clear_rows(backward ? a->dq",
)
domain("first_piece_of_tables_alone", "with_tables && piece < PIECES", "with_tables && piece < 1")
both("edge_excluded", "bucket -= bits >= next", "bucket -= bits > next", edges)
both("guess_not_mended", "bucket -= bits >= next", "(void)next", edges)
both("exponential_off", "splat(1.6666665459e-1f)", "splat(1.66e-1f)")

state("own_state_unseen", "x->from[slot] = (int32_t)i;", "x->from[slot] = (int32_t)i + 1;")
state("later_states_of_the_block_seen", "x->from[slot] = (int32_t)i;", "x->from[slot] = 0;")
state(
    "last_query_lost",
    "s->query_of[end - 1] < 0) end--;",
    "s->query_of[end - 1] < 0) end--;\n    if (!backward && end > first) end--;",
)
domain(
    "place_of_a_key_for_the_query",
    "a->query_places[group->queries[first + r]]",
    "a->places[group->queries[first + r]]",
    asked,
)
domain(
    "position_of_a_key_for_the_query",
    "a->max_length - 1 - a->query_positions[token]",
    "a->max_length - 1 - a->positions[token]",
    asked,
)
state(
    "newest_replaced",
    "x->visits[domain]++ % s->states_per_domain",
    "(x->visits[domain]++ ? 1 : 0)",
)
state(
    "replaced_too_early",
    "(int32_t)smaller(x->until[replaced], i)",
    "0",
)
state(
    "replaced_at_the_end_of_a_block",
    "x->until[replaced] = (int32_t)smaller",
    "(void)smaller",
)
state("replaced_in_the_block_stays", "replaced = block.slots[earlier]", "(void)earlier")
state(
    "some_queries_of_a_block_lost",
    "(rows.rows < ROWS && i + 1 < block->tokens)",
    "rows.rows < ROWS",
)
state(
    "initial_state_stays",
    "        x->slot_of[d * s->states_per_domain] = d;\n",
    "",
)
state("unseen_slots_weigh", "+ ages - 1] = -INFINITY", "+ ages - 1] = 0")
state("replaced_initial_states_weigh", "of_initial, splat(-INFINITY))", "of_initial, of_initial)")
state(
    "moved_initial_state_loses_its_place",
    "        x->slot_of[(row - s->states) * s->states_per_domain] = slot;\n",
    "",
)
state("moved_initial_state_leaves_its_gradients", "        if (backward) hand_over(x, last);\n", "")
state(
    "bias_of_many_initial_states_lost",
    "sums[SUMS * x->s->never_written] += sum(of_initial);",
    "(void)of_initial;",
)
state("gradients_not_cleared", "        clear(dk, x->dqk);\n", "")
state("gradients_never_handed_over", "    if (backward) hand_over(x, slot);\n    if", "    if")
state("softmax_gradient_without_its_mean", "(load(slopes + j) - mean)", "load(slopes + j)")
state("age_of_the_initial_state", "(never & is_initial)", "(splat_int(0) & is_initial)")
state(
    "age_at_the_own_event",
    "s->next_timestamps[token] - x->written",
    "s->timestamps[token] - x->written",
)
state("bias_of_the_first_head", "x->bias + head * (x->s->never_written + 2)", "x->bias")
state("initial_gradients_of_the_last_piece", "dk[c] += of_initial[c]", "dk[c] = of_initial[c]")
state(
    "users_share_their_slots",
    "    begin(x, backward);\n    for",
    "    if (!user) begin(x, backward);\n    for",
)


new_row("own_columns_not_put", "user->first + i] = own[c]", "user->first + i] = 0 * own[c]")
new_row("last_columns_lost", "(x->end - full) * sizeof(float)", "0")
new_row("readers_stand_behind_one_another", "(int32_t)smaller(j, last)", "(int32_t)j")
new_row("reader_sees_another", "i == number && !user->is_virtual", "i <= number")
new_row("row_does_not_see_itself", "? i <= number :", "? i < number :")
new_row("own_domain_for_the_target", "run == OWN ? row->domain : row->target", "row->domain")
new_row("target_for_the_own_domain", "run == OWN ? row->domain : row->target", "row->target")
new_row("heads_see_every_domain", "if (run != EVERYTHING)", "if (0)")
new_row("position_shifted", "(s->origin - row->position)", "(s->origin - row->position + 1)")
new_row("time_bias_lost", " + s->times[bucket[lane]]", "")
new_row("first_state_for_all_heads", "(s->layer * s->heads + head) * user->num_states", "0")
new_row("hidden_states_weigh", "slot < x->end && !hidden[slot]", "slot < x->end")
new_row("initial_states_age", "is_initial ? s->never_written : bucket[lane]", "bucket[lane]")
new_row("states_not_divided", "load(weights + j) / splat(total)", "load(weights + j)")
new_row("own_states_have_no_time", "if (j >= own && j < x->end)", "if (0)")


@pytest.mark.parametrize("check", [asked, new_rows])
def test_what_is_not_mutated_passes(check: Check) -> None:
    check()


@pytest.mark.parametrize("name", MUTANTS)
def test_the_checks_reject_the_mutant(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, text, instead, check = MUTANTS[name]
    mutated(tmp_path, file, text, instead)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (domain_native, state_native, step_memory):
        library = copied(module.LIBRARY, tmp_path)
        assert library.problem() is None
        monkeypatch.setattr(module, "LIBRARY", library)
    with pytest.raises(AssertionError, match="error"):
        check()
