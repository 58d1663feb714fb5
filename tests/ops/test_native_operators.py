"""The loops in C: what they must hold beyond what every implementation does, and their net."""

import logging
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from attention_cases import Spec, draw, errors_against_oracle
from kernel_cases import check_bucket_edges
from native_marks import copied, mutated, needs_compiler
from state_cases import Spec as StateSpec
from state_cases import draw as draw_states
from torch import Tensor

from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.model import step_memory
from hstu_xd.ops import (
    available_impls,
    available_state_impls,
    domain_attention,
    first_use,
    state_attention,
)
from hstu_xd.ops import native_library as library
from hstu_xd.ops.domain_attention import native as domain_native
from hstu_xd.ops.first_use import KernelUse
from hstu_xd.ops.native_library import NativeLibrary
from hstu_xd.ops.new_rows import native as rows_native
from hstu_xd.ops.state_attention import native as state_native

SPEC = Spec((70, 0, 1, 17, 33, 2), num_domains=3)
LIBRARIES = [module.LIBRARY for module in (domain_native, state_native, rows_native)]
STATES = StateSpec((40, 1, 17, 0, 9), 5, 3, visited=3)


def attend(spec: Spec, impl: str) -> list[Tensor]:
    """Output and all gradients of a case."""
    case = draw(spec)
    leaves = case.tensors(torch.float32)
    out = domain_attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        case.grouping(),
        norm_length=case.norm_length,
        bias=case.relative_bias(leaves),
        impl=impl,
    )
    found = torch.autograd.grad(out, list(leaves.values()), torch.from_numpy(case.grad_out))
    return [out.detach(), *found]


def ask(impl: str) -> list[Tensor]:
    """Output and all gradients of DDSR's case."""
    case = draw_states(STATES)
    leaves = case.leaves(torch.float32)
    out = state_attention(**leaves, reads=case.reads(), impl=impl)
    return list(case.with_gradients(out, leaves).values())


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "run",
    [partial(attend, SPEC), partial(attend, replace(SPEC, target_view=True)), ask],
    ids=["own", "target", "states"],
)
def test_the_number_of_threads_changes_no_bit(run: Callable[[str], list[Tensor]]) -> None:
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(run("native"))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other))


@needs_compiler
@pytest.mark.parametrize("target_view", [False, True], ids=["own", "target"])
def test_more_keys_than_a_stretch_and_more_groups_than_pieces(target_view: bool) -> None:
    for lengths, domains in (((400, 3), 1), ((9,) * 90, 4)):
        spec = Spec(lengths, domains, target_view=target_view)
        run = partial(domain_attention, impl="native")
        errors_against_oracle(run, draw(spec), torch.float32).check()


@needs_compiler
def test_every_edge_of_a_time_bucket_is_found() -> None:
    check_bucket_edges("native")


@needs_compiler
def test_no_user_moves_another_one_by_a_number_that_is_none() -> None:
    """Slots that are not in use for a user held the states of the one before."""
    case = draw_states(StateSpec((9, 5), 5, 2, visited=5))
    leaves = {name: x.detach().clone() for name, x in case.leaves(torch.float32).items()}
    before = state_attention(**leaves, reads=case.reads(), impl="native")
    for name in "qkv":
        leaves[name][:9] = float("nan")
    after = state_attention(**leaves, reads=case.reads(), impl="native")
    assert torch.equal(before[9:], after[9:])


@needs_compiler
def test_auto_takes_them_on_a_cpu() -> None:
    assert all(torch.equal(*pair) for pair in zip(attend(SPEC, "auto"), attend(SPEC, "native")))
    assert all(torch.equal(*pair) for pair in zip(ask("auto"), ask("native")))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_computed_in_float32(dtype: torch.dtype) -> None:
    case = draw(replace(SPEC, biased=False)).rounded(dtype)
    q, k, v = (x.detach() for x in case.tensors(torch.float32).values())
    run = partial(domain_attention, norm_length=9, impl="native")
    wide = run(q, k, v, case.grouping())
    narrow = run(*(x.to(dtype) for x in (q, k, v)), case.grouping())
    assert torch.equal(narrow, wide.to(dtype))


@needs_compiler
def test_what_they_do_not_take_is_refused_and_left_to_pytorch_by_auto() -> None:
    case = draw(replace(SPEC, biased=False))
    q, k, v = (x.detach() for x in case.tensors(torch.float64).values())
    run = partial(domain_attention, norm_length=9)
    with pytest.raises(InputError, match=r"q is torch\.float64 on cpu; impl 'native' needs float"):
        run(q, k, v, case.grouping(), impl="native")
    assert run(q, k, v, case.grouping()).dtype == torch.float64
    ruled = replace(case.grouping(), rule=lambda query, key: query == key)
    with pytest.raises(InputError, match="grouping has a rule of its own, which impl 'native' can"):
        run(*(x.float() for x in (q, k, v)), ruled, impl="native")
    states = draw_states(STATES)
    with pytest.raises(InputError, match=r"q is torch\.float64 on cpu; impl 'native' needs float"):
        state_attention(**states.leaves(torch.float64), reads=states.reads(), impl="native")


@needs_compiler
def test_a_compiled_graph_is_plain_pytorch() -> None:
    case = draw(replace(SPEC, biased=False))
    leaves = [x.detach() for x in case.tensors(torch.float32).values()]
    grouping = case.grouping()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return domain_attention(q, k, v, grouping, norm_length=9)

    found = torch.compile(run, backend="eager")(*leaves)
    torch.testing.assert_close(found, run(*leaves), rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing is compiled yet, and the cache is a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.forget()
    yield tmp_path / "cache" / "hstu-xd"
    monkeypatch.undo()
    library.forget()


@needs_compiler
def test_a_library_is_compiled_once_a_machine(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert domain_native.LIBRARY.problem() is None
    (compiled,) = fresh.iterdir()
    at = compiled.stat().st_mtime_ns
    library.forget()
    attend(SPEC, "native")
    assert [x.stat().st_mtime_ns for x in fresh.iterdir()] == [at]
    # Others may not put a library there.
    fresh.chmod(0o777)
    library.forget()
    compiled.unlink()  # what is loaded of it stays whole
    compiled.write_text("not a library")
    attend(SPEC, "native")


@needs_compiler
def test_who_has_no_home_compiles_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    library.forget()
    try:
        attend(SPEC, "native")
    finally:
        library.forget()


def without_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    monkeypatch.setenv("CC", str(folder / "no-such-compiler"))
    return "no C compiler was found (cc, gcc, clang, or the one that CC names)"


def with_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    path = folder / "cc"
    path.write_text(
        "#!/bin/sh\ncase $* in *-E*) exit 0;; esac\necho 'x.c:1: error: no' >&2; exit 1"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return f"{path} failed: x.c:1: error: no"


def with_a_compiler_that_makes_no_library(monkeypatch: pytest.MonkeyPatch, folder: Path) -> str:
    path = folder / "cc"
    path.write_text(
        '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo nothing > "$2"; shift; done'
    )
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return f"{path}: "


@pytest.mark.parametrize(
    "spoil", [without_compiler, with_a_compiler_that_fails, with_a_compiler_that_makes_no_library]
)
def test_without_a_library_auto_is_plain_pytorch(
    spoil: Callable[[pytest.MonkeyPatch, Path], str],
    fresh: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    reason = spoil(monkeypatch, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert all(torch.equal(*pair) for pair in zip(attend(SPEC, "auto"), attend(SPEC, "eager")))
        assert all(torch.equal(*pair) for pair in zip(ask("auto"), ask("eager")))
    assert not caplog.records
    assert "native" not in (*available_impls(), *available_state_impls())
    assert (domain_native.LIBRARY.problem() or "").startswith(reason)
    with pytest.raises(InputError, match="impl 'native' is not available here"):
        attend(SPEC, "native")
    with pytest.raises(InputError) as error:
        state_native.native_state_attention(
            *(x for n, x in draw_states(STATES).leaves(torch.float32).items() if n in "qkv"),
            draw_states(STATES).reads(),
        )
    assert str(error.value).startswith(f"impl 'native' cannot be used here: {reason}")


@needs_compiler
@pytest.mark.parametrize(
    ("file", "text", "instead"),
    [
        ("domain_attention", "(gate + weight * (splat(1.0f) - gate))", "gate"),
        ("state_attention", "factors[r] = 1.0f / factors[r]", "splat(1.0f)"),
    ],
)
def test_a_compiler_that_computes_something_else_is_found_out(
    file: str,
    text: str,
    instead: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    operator = {"domain_attention": domain_native, "state_attention": state_native}[file]
    run = {"domain_attention": partial(attend, SPEC), "state_attention": ask}[file]
    folder = mutated(tmp_path, f"{file}/native.c", text, instead)
    monkeypatch.setattr(operator, "LIBRARY", copied(operator.LIBRARY, folder))
    first_use._tried.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert all(torch.equal(*pair) for pair in zip(run("auto"), run("eager")))
        (record,) = caplog.records
        assert f"the loop in C of {file} in float32 with 2 heads of 5 and 7" in record.message
        with pytest.raises(HstuXdError, match="cannot be used on cpu: it differs from plain PyTo"):
            run("native")
    finally:
        first_use._tried.cache_clear()


@needs_compiler
def test_a_compiler_without_openmp_gives_one_thread(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "cc"
    path.write_text(
        f"#!/bin/sh\ncase $* in *-fopenmp*) exit 1;; esac\nexec {library.compiler()} $*\n"
    )
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    errors_against_oracle(
        partial(domain_attention, impl="native"), draw(SPEC), torch.float32
    ).check()


on_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="NOT covered: vectors of several lengths need an x86_64"
)


@on_x86
@needs_compiler
@pytest.mark.parametrize("machine", ["native", "x86-64", "haswell", "skylake-avx512"])
@pytest.mark.parametrize("native", LIBRARIES, ids=lambda x: x.source.parent.name)
def test_vectors_are_no_longer_than_the_processors(native: NativeLibrary, machine: str) -> None:
    """GCC, which warns of longer ones, would compare them lane by lane, several times slower."""
    found = library.compiler()
    assert found is not None
    if "clang" in library._run(found, "--version").stdout:
        pytest.skip("NOT covered: clang does not tell of vectors that are too long")
    library._run(
        found, f"-march={machine}", "-Werror=psabi", "-S", "-o", os.devnull, str(native.source)
    )


@on_x86
@needs_compiler
@pytest.mark.parametrize("flag", ["-march=x86-64", "-D__AVX512F__"], ids=["short", "long"])
def test_vectors_of_other_lengths_give_the_same(
    flag: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of four floats, and of sixteen, which this processor need not have."""
    path = tmp_path / "cc"
    path.write_text(f'#!/bin/sh\nexec {library.compiler()} "$@" {flag}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    run = partial(domain_attention, impl="native")
    errors_against_oracle(run, draw(SPEC), torch.float32).check()
    for found, expected in zip(ask("native"), ask("eager")):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    use = KernelUse("new_rows", torch.device("cpu"), torch.float32, 2, 5, 7, True, "native")
    assert first_use._try(use, step_memory._trial) is None
