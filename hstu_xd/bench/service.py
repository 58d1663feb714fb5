"""``bench service``: the real service under twice the load that it can bear.

Half of the calls are events, half are recommendations. The rate that the service can bear is
measured first, by a few connections that wait for their answers; then calls come at twice that
rate, whether or not earlier ones are answered. In the end the log must hold every accepted event
and no other one, and the answers must equal those of states that are built anew from the log.

With a PostgreSQL server the same is done with a file and with the server by one process, and with
the server by several, which share all users or have their own, as a proxy would send them; with a
store of states, once more with that. The log may have events from the start, of other users; then a
row also says how long it took until the service was ready, with them and without.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from hstu_xd.bench.cases import Case
from hstu_xd.bench.http_load import Outcome
from hstu_xd.bench.rows import Row, empty_row
from hstu_xd.bench.service_inputs import (
    EARLIER,
    Setup,
    earlier_users,
    fill_log,
    synthetic_run,
)
from hstu_xd.bench.service_traffic import NOW, Traffic, domain_of
from hstu_xd.bench.timing import torch_threads
from hstu_xd.catalog import DomainCatalog
from hstu_xd.cores import usable_cores
from hstu_xd.errors import HstuXdError, InputError
from hstu_xd.serving import EncoderSession
from hstu_xd.serving.events.event_log import EventLog
from hstu_xd.serving.events.open_log import is_postgres
from hstu_xd.serving.http.failover import check_store
from hstu_xd.serving.http.settings import default_threads

# Share of the given seconds that the load takes which waits for its answers.
_SHARE = 0.2
_OVERLOAD = 2.0
# Earlier users whose first answers are measured, by states that are made for them.
_FIRST = 100
# Names that a log is asked for at once.
_AT_ONCE = 1000
# Largest difference of a score, which is a cosine.
_BUDGET = 1e-5


def measure(
    run: Path | None,
    case: Case,
    *,
    seconds: float,
    threads: int | None = None,
    workers: int = 1,
    events: str | None = None,
    store: str = "memory",
    connections: int = 8,
    log_events: int = 0,
) -> Iterator[Row]:
    """Put a service under load and yield its row; rows of those to compare with come before it.

    The times ``ms_*`` are those of accepted requests at twice the capacity, from the time that a
    request was due.

    Args:
        run: a trained run; None takes a model with random weights and a synthetic log.
        case: sizes of that model; ``seq_len`` is its window and the mean history of its users.
        seconds: seconds of overload.
        threads: threads of PyTorch in each process; None: as serve takes.
        workers: processes.
        events: URL of a PostgreSQL server that may make databases; None: the log is a file.
        store: of states beyond memory, as serve takes it.
        connections: of the clients that wait for their answers.
        log_events: events that the log has from the start.

    Raises:
        InputError: several workers without a log that they can share, no such URL, or no such kind
            of store.
        StoreError: the store cannot be used.
    """
    if workers > 1 and events is None:
        raise InputError(
            f"--workers {workers} share a log: give --events postgresql://HOST:PORT/DATABASE"
        )
    if events is not None and not is_postgres(events):
        raise InputError("--events: the URL of a PostgreSQL server is needed, postgresql://...")
    setups = [Setup("service", 1, None)]
    if events is not None:
        setups.append(Setup("postgres", 1, events))
    if workers > 1:
        setups.append(Setup(f"{workers} workers, users apart", workers, events, apart=True))
        setups.append(Setup(f"{workers} workers", workers, events))
    if store != "memory":
        last = setups[-1]
        stored = replace(last, store=store)
        setups.append(replace(stored, name=f"{last.name}, states in {stored.place_of_states}"))
    with TemporaryDirectory() as folder:
        place = Path(folder)
        # Servers that cannot be used are known before anything is measured.
        check_store(store)
        with setups[-1].log(place):
            pass
        made = run or synthetic_run(place, case)
        rows: list[Row] = []
        for setup in setups:
            with setup.log(place) as log:
                served = _Served.from_folder(made, log)
                row = _measured(
                    served,
                    case,
                    setup,
                    seconds=seconds,
                    threads=threads,
                    connections=connections,
                    log_events=log_events,
                )
            row["run"] = None if run is None else str(run)
            for rival in rows:
                key = f"times_faster_than_{rival['provider']}"
                row[key] = row["capacity_per_second"] / rival["capacity_per_second"]
            rows.append(row)
            yield row


def _measured(
    served: "_Served",
    case: Case,
    setup: Setup,
    *,
    seconds: float,
    threads: int | None,
    connections: int,
    log_events: int,
) -> Row:
    taken = threads or max(1, usable_cores() // setup.workers)
    if threads is None and setup.workers == 1:
        taken = default_threads()
    with torch_threads(taken):
        opening: Row = {}
        if log_events:
            with _services(served, setup, taken) as empty:
                opening = {"log_events": log_events, "ready_s_empty": empty.ready_s}
            fill_log(served.log, served.catalog, log_events)
        with _services(served, setup, taken) as running:
            traffic = Traffic(served.catalog, running.ports)
            found: dict[str, dict[str, float]] = {}
            if log_events:
                count = earlier_users(log_events)
                users = [f"{EARLIER}{n * count // _FIRST}" for n in range(min(_FIRST, count))]
                first = traffic.answers(users)
                found = first.found
                opening |= {"ready_s": running.ready_s, "first_ms_median": first.ms_median}
            are_built = traffic.build_states()
            before, measured = running.cpu_seconds(), max(1.0, _SHARE * seconds)
            closed = traffic.load().closed(traffic.draw, seconds=measured, connections=connections)
            after = running.cpu_seconds()
            answered = sum(x.status == 200 for x in closed)
            capacity = answered / measured
            opened = traffic.load().open(traffic.draw, rate=_OVERLOAD * capacity, seconds=seconds)
            found |= traffic.answers(traffic.users).found
            peak = running.peak_bytes()
        row = empty_row(setup.name, served.case(case), threads=taken, repeats=1)
        row |= {"what": "service", "peak_bytes": peak, "workers": setup.workers}
        row |= {"users_apart": setup.apart, "connections": connections}
        row["events_in"] = "SQLite" if setup.events is None else "PostgreSQL"
        row |= {"states_in": setup.place_of_states, "states_built": are_built}
        if before is not None and after is not None and answered:
            row["cpu_ms_per_request"] = 1e3 * (after - before) / answered
        row |= opening | _figures(closed, opened, capacity, seconds)
        row |= served.check([*closed, *opened], found)
    wrong = row["other_errors"] + row["lost_events"] + row["foreign_events"]
    row["correct"] = wrong == 0 and row["error_of_budget"] <= 1
    return row


@dataclass(frozen=True, eq=False)
class _Served:
    """A run that is served, and the log of the service.

    Attributes:
        run: folder of the run.
        log: of the events.
        catalog: catalogue of the run.
    """

    run: Path
    log: str
    catalog: DomainCatalog

    @classmethod
    def from_folder(cls, run: Path, log: str) -> "_Served":
        return cls(run, log, DomainCatalog.load(run))

    def case(self, case: Case) -> Case:
        """Return the case with the sizes of this run's model."""
        from hstu_xd.training.run import load
        from hstu_xd.training.run_facts import read_run

        s = load(self.run).settings
        return replace(
            case,
            seq_len=min(read_run(self.run)["max_sequence_length"], s.norm_length),
            num_domains=s.num_domains,
            heads=s.num_heads,
            dqk=s.dqk,
            dv=s.dv,
            width=s.embedding_dim,
            layers=s.num_blocks,
            batch_size=1,
        )

    def check(self, outcomes: Iterable[Outcome], found: dict[str, dict[str, float]]) -> Row:
        """Compare log and answers with what was accepted.

        Args:
            outcomes: outcomes of all calls.
            found: by user the items and their scores, for the user's domain.
        """
        from hstu_xd.serving.events.open_log import open_log
        from hstu_xd.serving.http.histories import Histories
        from hstu_xd.serving.http.live_model import load_engine
        from hstu_xd.serving.http.retrieval_engine import RetrievalEngine
        from hstu_xd.serving.http.settings import ServiceSettings
        from hstu_xd.serving.items import Items

        accepted = Counter(
            (event["user"], event["item"])
            for outcome in outcomes
            if outcome.status == 200
            for event in (outcome.call.body or {}).get("events", ())
        )
        log, settings = open_log(self.log), ServiceSettings(self.log)
        engine = load_engine(self.run, settings)
        assert isinstance(engine, RetrievalEngine)
        names = [*{user for user, _ in accepted} | set(_later_users(log))]
        logged = Counter(
            (event.user, event.item) for known in log.read(names) for event in known.events
        )
        items = Items(self.catalog)
        histories = Histories(log, self.catalog, items, engine.prepared)
        fresh = EncoderSession(engine.model, window=engine.window, history=histories.all_of)
        worst = 0.0
        for user, scores in found.items():
            ids = torch.tensor([[items.id_of(token) for token in scores]])
            wanted = fresh.score([user], ids, [domain_of(user, self.catalog)])[0]
            worst = max(worst, float((wanted - torch.tensor([*scores.values()])).abs().max()))
            fresh.forget(user)
        log.close()
        return {
            "accepted_events": accepted.total(),
            "lost_events": (accepted - logged).total(),
            "foreign_events": (logged - accepted).total(),
            "checked_users": len(found),
            "error_of_budget": worst / _BUDGET,
        }


def _later_users(log: EventLog) -> list[str]:
    """Return all users of a log but those who were there before the service."""
    found: list[str] = []
    # A few at a time, as there may be a hundred thousand; each begins with the last one before.
    while some := log.users_from(found[-1] if found else "", _AT_ONCE)[bool(found) :]:
        found += some
        if some[-1].startswith(EARLIER):
            break
    return [user for user in found if not user.startswith(EARLIER)]


def _figures(closed: list[Outcome], opened: list[Outcome], capacity: float, seconds: float) -> Row:
    """Return the columns of times and shares of both loads."""
    accepted = np.array([x.seconds for x in opened if x.status == 200]) * 1e3
    refused = sum(x.status == 503 for x in opened)
    others = Counter(x.status for x in (*closed, *opened) if x.status not in (200, 503))
    if not accepted.size:
        raise HstuXdError(f"the service accepted nothing; it said {opened[0].answer!r}")
    low, median, high, late = np.percentile(accepted, [20, 50, 80, 99]).tolist()
    served = [x.seconds * 1e3 for x in closed if x.status == 200]
    alone = np.percentile(served, [50, 99]).tolist()
    return {
        "ms_median": median,
        "ms_p20": low,
        "ms_p80": high,
        "ms_p99": late,
        "p99_of_p50": late / median,
        "seconds": seconds,
        "capacity_per_second": capacity,
        "capacity_ms_median": alone[0],
        "capacity_ms_p99": alone[1],
        "offered_per_second": len(opened) / seconds,
        "accepted_per_second": accepted.size / seconds,
        "refused_share": refused / len(opened),
        "other_errors": others.total(),
        "other_statuses": {str(status): count for status, count in sorted(others.items())},
    }


@dataclass(frozen=True)
class _Running:
    """Services that take requests.

    Attributes:
        processes: of them.
        ports: that they listen on.
        ready_s: seconds from the start of the processes until all were ready.
    """

    processes: "list[subprocess.Popen[str]]"
    ports: list[int]
    ready_s: float

    def cpu_seconds(self) -> float | None:
        """Return the time on a core that they have taken, workers too; None: not known."""
        ticks = 0
        for folder in self._folders():
            # After the name, which may have spaces.
            columns = (folder / "stat").read_text().rpartition(")")[2].split()
            ticks += int(columns[11]) + int(columns[12])
        return ticks / os.sysconf("SC_CLK_TCK") if ticks else None

    def peak_bytes(self) -> int | None:
        """Return the most memory of each process, workers too, added; None: not known."""
        peaks = [
            int(line.split()[1]) * 1024
            for folder in self._folders()
            for line in (folder / "status").read_text().splitlines()
            if line.startswith("VmHWM:")
        ]
        return sum(peaks) if peaks else None

    def _folders(self) -> list[Path]:
        """Return the folders in /proc, if any, of the processes and of those they have started."""
        owns = [Path(f"/proc/{process.pid}") for process in self.processes]
        owns = [own for own in owns if own.exists()]
        children = [(own / "task" / own.name / "children").read_text().split() for own in owns]
        return owns + [Path("/proc") / pid for pids in children for pid in pids]


@contextmanager
def _services(served: _Served, setup: Setup, threads: int) -> Iterator[_Running]:
    """Start the services of a setup, and drain them in the end."""
    command = [sys.executable, "-m", "hstu_xd", "serve", str(served.run), "--port", "0"]
    # Events come after those of any log, whatever its unit.
    command += ["--max-clock-skew", str(NOW), *setup.options]
    command += ["--events", served.log, "--threads", str(threads)]
    began = time.perf_counter()
    with ExitStack() as stack:
        ports, processes = [], []
        for _ in range(setup.services):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            stack.callback(_end, process)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            said = process.stdout.readline()
            if not said.startswith("serving "):
                raise HstuXdError("the service did not start; it says why on stderr")
            ports.append(int(said.rpartition(":")[2]))
        yield _Running(processes, ports, time.perf_counter() - began)
        for process in processes:
            process.send_signal(signal.SIGTERM)
            if process.wait(60):
                raise HstuXdError(f"the service ended with status {process.returncode} on SIGTERM")


def _end(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.wait()
