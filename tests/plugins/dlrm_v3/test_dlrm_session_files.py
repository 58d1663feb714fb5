"""What a session keeps can be saved, the trainer's checkpoints opened, and bad input is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dlrm_runs import Run, process_of
from session_cases import GIN, count_rows, logged, session_and_whole

from hstu_xd.data.store import InteractionStore
from hstu_xd.errors import InputError
from hstu_xd.plugins.bridge import free_port
from hstu_xd.plugins.dlrm_v3.session import DlrmSession


def test_what_is_kept_can_be_saved(
    tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed, file = count_rows(monkeypatch), tmp_path / "states.pt"
    with session_and_whole(tiny_store, "all") as (session, _, store):
        user = store.user_token(0)
        session.append([user], [3], [2_000_000_000])
        expected = session.score([user], torch.tensor([[1, 2, 60]]))
        session.save(file)
    del computed[:]
    with session_and_whole(tiny_store, "all") as (session, _, _):
        session.load(file)
        assert user in session
        found = session.score([user], torch.tensor([[1, 2, 60]]))
        assert computed == [3]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        with pytest.raises(InputError, match="an event at 5 after one at 2000000000"):
            session.append([user], [3], [5])
        with torch.no_grad():
            next(iter(session._model.parameters())).add_(1.0)
        with pytest.raises(InputError, match="states of another model"):
            session.load(file)
        for content in (b"", b"nothing"):
            file.write_bytes(content)
            with pytest.raises(InputError, match="no states of a session"):
                session.load(file)
        with pytest.raises(InputError, match="no states of a session"):
            session.load(tmp_path / "missing")


def test_a_checkpoint_of_the_trainer_is_opened(tiny_store: Path, tmp_path: Path) -> None:
    bindings = "xd_dlrm.norm_length = 130\n"
    with process_of(tiny_store, free_port(), bindings):
        run = Run()
        run.train(range(3))
        run.save(tmp_path)
        requests = run.requests.requests
        number = requests.num_train
        sample = run.requests.get_samples([number])
        run.model.eval()
        features = sample.uih_features_kjt, sample.candidates_features_kjt
        with torch.no_grad():
            expected = run.model(*features)[3][0].double()
        batch = requests.batch(np.array([number]))
    everything = [f"xd_encoder.{name} = True" for name in ("domain_mask", "tape", "ddsr")]
    told = [f'dataset = "xd:{tiny_store}"', bindings.strip(), *everything]
    session = DlrmSession.open(tmp_path / "3", GIN, bindings=told)
    store = InteractionStore.open(tiny_store)
    # A stranger who has had the events that the request shows.
    session.append(["stranger"] * len(batch.items), batch.items.tolist(), batch.times.tolist())
    found = session.score(
        ["stranger"], batch.candidates.unsqueeze(0), batch.request_times[:1].tolist()
    )
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match=r"it has no .*_xd_target_domain_emb.* and no more"):
        DlrmSession.open(
            tmp_path / "3",
            GIN,
            bindings=[*told, "xd_encoder.target_domain_embedding = True"],
        )
    with pytest.raises(InputError, match="a checkpoint of another model, which differs in"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, "xd_dlrm.hstu_attn_num_layers = 3"])
    with pytest.raises(InputError, match="no checkpoint there"):
        DlrmSession.open(tmp_path / "4", GIN, bindings=told)
    with pytest.raises(InputError, match=r"xd_dlrm\.norm_length = 0: a session needs one above"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, "xd_dlrm.norm_length = 0"])
    with pytest.raises(InputError, match=r"make_model\.dataset = 'kuairand-1k'; a session needs"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=[*told, 'dataset = "kuairand-1k"'])
    with pytest.raises(InputError, match=r"dlrm_stock\.gin: .*no_such"):
        DlrmSession.open(tmp_path / "3", GIN, bindings=["xd_dlrm.no_such = 1"])
    assert store.find_user("stranger") is None


def test_bad_input_is_named_and_changes_nothing(tiny_store: Path) -> None:
    with session_and_whole(tiny_store, "all") as (session, _, store):
        user, last = store.user_token(0), logged(store, 0)[-1][1]
        before = session.score([user], torch.tensor([[1]]))
        for wrong, message in (
            ((["a"], [1, 2], [3]), "1 users, 2 items and 1 timestamps"),
            (
                ([user, user], [1, 91], [last, last]),
                r"unknown item 91; the catalogue has items 1\.\.90",
            ),
            (([user], [0], [last]), "unknown item 0"),
            (
                ([user, user], [1, 2], [last, last - 1]),
                f"an event at {last - 1} after one at {last}",
            ),
            (([user, "ann"], [1, 2], [last, last]), "unknown user 'ann'.*user_token = False"),
        ):
            with pytest.raises(InputError, match=message):
                session.append(*wrong)
        for arguments, message in (
            (([user], torch.tensor([1, 2])), r"candidates has shape \(2,\); \(1, C\) is needed"),
            (([user, user], torch.tensor([[1, 2]])), r"shape \(1, 2\); \(2, C\)"),
            (([user], torch.tensor([[91]])), "unknown item 91"),
            (([user], torch.tensor([[1]]), [1, 2]), "2 request_timestamps for 1 users"),
            ((["ann"], torch.tensor([[1]])), "unknown user 'ann'"),
        ):
            with pytest.raises(InputError, match=message):
                session.score(*arguments)
        torch.testing.assert_close(session.score([user], torch.tensor([[1]])), before)
