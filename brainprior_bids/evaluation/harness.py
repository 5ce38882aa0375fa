# SPDX-License-Identifier: Apache-2.0
"""Run the cases of all studies in one pool of processes, and resume unfinished runs.

There are three rounds of parallel jobs: the participants, the penalties of the classical methods
on the validation set, and the cases. Each job's result is one file below the output folder, moved
into place when complete, with a fingerprint of its inputs, settings and weights: the same command
resumes where it stopped, and replaces results of other weights or settings. A job that fails, or
whose process dies, is reported; the others continue.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from brainprior_bids.engine.errors import BrainpriorError
from brainprior_bids.engine.weights import FOLDER, read_weights, sha256_file
from brainprior_bids.evaluation import protocol
from brainprior_bids.evaluation.protocol import Condition, Participant, from_labels, from_scan
from brainprior_bids.evaluation.studies import find
from brainprior_bids.evaluation.studies.base import (
    Bench,
    Settings,
    Source,
    parcellation,
)
from brainprior_bids.evaluation.summary import Record
from brainprior_bids.evaluation.usage import Watch

log = logging.getLogger(__name__)

VERSION = 2
"""Version of the records; raise it when their meaning changes."""
COARSE, PARCELLATION = FOLDER / "coarse.safetensors", FOLDER / "parcellation.safetensors"
TUNED_BY = ("spacing_mm", "noise_sd", "width", "profile", "in_plane_mm", "rician", "crop_mm")
"""Fields of a condition that determine its penalties."""


@dataclass(frozen=True)
class Case:
    """One record: a study, a participant and the settings."""

    study: str
    source: Source
    settings: Settings

    @property
    def stem(self) -> str:
        """Stem of the names of its files."""
        name = self.settings.name.replace(" ", "-").replace(",", "")
        return f"{self.source.stem}_{name}"

    def record(self, out: Path) -> Path:
        """Path of its record below the output folder."""
        return out / "results" / self.study / f"{self.stem}.json"


@dataclass(frozen=True)
class Failure:
    """The message of a failed job, and the studies that lack a result because of it."""

    text: str
    studies: frozenset[str]


@dataclass(frozen=True)
class Job:
    """A function with its arguments, to be run in any process."""

    title: str
    name: str
    studies: frozenset[str]
    work: Callable[..., None]
    arguments: tuple[Any, ...]


def run(
    cases: Sequence[Case], sources: Sequence[Source], *, out: Path, prior: Path, device: str,
    nprocs: int, crop: tuple[int, int, int], width_off: float, limit_s: float,
) -> list[Failure]:  # fmt: skip
    """Compute every record that is missing.

    Parameters
    ----------
    cases, sources : sequence
        All cases, and all participants and label maps with the validation set.
    out : Path
        Folder of participants, penalties and records; created if missing.
    prior : Path
        Weights.
    device : str
        ``cpu`` or ``cuda[:N]``.
    nprocs : int
        Processes; with one, this process does the work.
    crop, width_off
        For the penalties: block of conditions on whole brains, mm, and the relative error of the
        stated slice thickness.
    limit_s
        Time limit of another program's command, in seconds.

    Returns
    -------
    list of Failure
    """
    bench = Bench(prior, device, out, limit_s=limit_s)
    sha256 = {
        kind: read_weights(path, kind=kind)[1]["sha256"]
        for kind, path in (("prior", prior), ("coarse", COARSE), ("parcellation", PARCELLATION))
    }
    tuned = {study for study in {case.study for case in cases} if find(study).tuned}
    with Pool(nprocs) as pool:
        jobs = [_participant_job(source, cases, tuned, out) for source in sources]
        failures = pool.run([job for job in jobs if job.studies])
        ready = [source for source in sources if participant_path(out, source).is_file()]
        cases = [case for case in cases if case.source in ready]
        validation = [source for source in ready if source.choosing]
        failures += pool.run(
            _tuning_jobs(cases, validation, tuned, out, crop=crop, width_off=width_off)
        )
        failures += pool.run(_case_jobs(cases, validation, tuned, bench, sha256))
    return failures


def _participant_job(source: Source, cases: Sequence[Case], tuned: set[str], out: Path) -> Job:
    studies = {case.study for case in cases if case.source == source}
    studies |= tuned if source.choosing else set()
    return Job("participant", source.stem, frozenset(studies), prepare, (source, out))


def _tuning_jobs(
    cases: Sequence[Case],
    validation: Sequence[Source],
    tuned: set[str],
    out: Path,
    *,
    crop: tuple[int, int, int],
    width_off: float,
) -> list[Job]:
    """One job per participant of the validation set and kind of scan."""
    jobs: dict[tuple[str, str], Job] = {}
    for case in (case for case in cases if case.study in tuned):
        condition = case.settings
        assert isinstance(condition, Condition)
        plain = replace(condition, bias_sd=0.0, field="none", crop_mm=condition.crop_mm or crop)
        for number, source in enumerate(validation):
            if not _alike(source, case.source):
                continue
            key = (source.stem, condition.kind)
            arguments = (source, replace(plain, width=1 + width_off * (-1) ** number), out)
            job = Job("tuning", " ".join(key), frozenset(), tune, arguments)
            job = jobs.get(key, job)
            jobs[key] = replace(job, studies=job.studies | {case.study})
    return list(jobs.values())


def _case_jobs(
    cases: Sequence[Case],
    validation: Sequence[Source],
    tuned: set[str],
    bench: Bench,
    sha256: Mapping[str, str],
) -> list[Job]:
    """One job per case; a picture is drawn of the first case of each contrast and settings."""
    drawn = set()
    jobs = []
    for case in cases:
        key = (case.study, case.settings.name, case.source.contrast)
        picture = bench.folder / "pictures" / f"{case.study}_{case.stem}.png"
        case_bench = replace(bench, picture=None if key in drawn else picture)
        drawn.add(key)
        names = [s.name for s in validation if _alike(s, case.source)]
        jobs.append(
            Job(
                "result",
                f"{case.study} {case.source.stem} {case.settings.name}",
                frozenset({case.study}),
                measure,
                (case, bench.folder, case_bench, sha256, names if case.study in tuned else None),
            )
        )
    return jobs


def _alike(one: Source, other: Source) -> bool:
    return (one.contrast, one.synthetic) == (other.contrast, other.synthetic)


class Pool:
    """Processes of one thread each; with ``nprocs`` 1, this process with all its threads."""

    def __init__(self, nprocs: int) -> None:
        self.nprocs = nprocs
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.executor is not None:  # after an interrupt, do not start the remaining jobs
            self.executor.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> list[Failure]:
        """Run the jobs; returns the failures."""
        failures = []
        for count, (job, error) in enumerate(self._done(jobs), 1):
            if error is None:
                log.info("%s %d of %d: %s", job.title, count, len(jobs), job.name)
            else:
                failures.append(Failure(f"{job.title} {job.name}: {error}", job.studies))
                log.warning("%s %s failed: %s", job.title, job.name, error)
        return failures

    def _done(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, str | None]]:
        """Yield each job when it ends, with its error or None."""
        if self.nprocs == 1:
            for job in jobs:
                yield job, _error_of(job.work, *job.arguments)
            return
        lost = yield from self._together(jobs)
        for job in lost:  # one of them killed its process, which broke the pool
            if (yield from self._together([job])):
                yield job, "its process was killed. Is there enough memory? Try a lower --nprocs."

    def _together(self, jobs: Sequence[Job]) -> Any:
        """Yield (job, error) for jobs that ended; return those that were lost with the pool."""
        if self.executor is None:
            self.executor = _processes(self.nprocs)
        futures: dict[Future[None], Job] = {
            self.executor.submit(job.work, *job.arguments): job for job in jobs
        }
        lost = []
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                lost.append(futures[future])
            else:
                yield futures[future], _error_of(future.result)
        if lost:
            self.executor.shutdown()
            self.executor = None
        return lost


def _processes(nprocs: int) -> ProcessPoolExecutor:
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
    return ProcessPoolExecutor(nprocs, mp_context=get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
    logging.getLogger("brainprior_bids").setLevel(logging.WARNING)


def _error_of(work: Callable[..., None], *arguments: Any) -> str | None:
    """Call ``work``; returns its error message, or None."""
    try:
        work(*arguments)
    except BrainpriorError as error:
        return str(error)
    except Exception as error:
        log.debug("", exc_info=True)
        return f"{type(error).__name__}: {error}"
    return None


def participant_path(out: Path, source: Source) -> Path:
    """The prepared participant below the output folder."""
    return out / "participants" / f"{source.stem}.npz"


def prepare(source: Source, out: Path) -> None:
    """Save a participant's truth, with mask, bias field and unit by brainprior's preprocessing."""
    path = participant_path(out, source)
    note = path.with_suffix(".json")
    mark = fingerprint(
        source=sha256_file(Path(source.path)),
        contrast=source.contrast,
        parcellation=sha256_file(PARCELLATION),
    )
    if path.is_file() and is_done(note, mark):
        return
    path.unlink(missing_ok=True)  # made from another scan
    file, network = Path(source.path), parcellation()
    if source.synthetic:
        participant = from_labels(file, source.name, source.contrast, network, path.parent)
    else:
        participant = from_scan(file, source.name, source.contrast, network)
    participant.save(path)
    write(note, {"fingerprint": mark, "source": file.name})


def _note(out: Path, source: Source) -> Record:
    return read(participant_path(out, source).with_suffix(".json"))


def _tuning_path(out: Path, stem: str, condition: Condition) -> Path:
    return out / "tuning" / f"{stem}_{condition.kind}.json"


def tune(source: Source, condition: Condition, out: Path) -> None:
    """Save the errors of every penalty on one participant of the validation set."""
    path = _tuning_path(out, source.stem, condition)
    used = {key: value for key, value in asdict(condition).items() if key in TUNED_BY}
    grids = (protocol.TIKHONOV_PENALTIES, protocol.TV_PENALTIES, protocol.SPREADS)
    mark = fingerprint(participant=_note(out, source), condition=used, grids=grids)
    if not is_done(path, mark):
        errors = protocol.tune(Participant.load(participant_path(out, source)), condition)
        write(path, {"fingerprint": mark, "errors": errors})


def penalties_for(
    out: Path, source: Source, condition: Condition, names: Sequence[str]
) -> tuple[dict[str, float], list[str]]:
    """Penalties for a condition, and the participants (of ``names``) on whom they were tuned."""
    paths = {name: _tuning_path(out, f"{name}_{source.contrast}", condition) for name in names}
    paths = {name: path for name, path in paths.items() if path.is_file()}
    if not paths:
        return dict(protocol.UNTUNED), []
    return protocol.choose([read(path)["errors"] for path in paths.values()]), list(paths)


def measure(
    case: Case,
    out: Path,
    bench: Bench,
    sha256: Mapping[str, str],
    validation: Sequence[str] | None,
) -> None:
    """Compute the record of a case, unless there is one of the same weights and settings.

    ``sha256`` has the hash of each network's weights. ``validation`` has the participants for the
    penalties of the classical methods; None for a study without these.
    """
    source, path = case.source, case.record(out)
    study = find(case.study)
    weights = {kind: sha256[kind] for kind in study.weights}
    facts: Record = {f"{kind}_sha256": value for kind, value in weights.items()}
    penalties: dict[str, float] = {}
    if validation is not None:
        assert isinstance(case.settings, Condition)
        penalties, facts["tuned_on"] = penalties_for(out, source, case.settings, validation)
    settings = asdict(case.settings)  # type: ignore[call-overload]
    mark = fingerprint(
        participant=_note(out, source),
        condition=settings,
        **weights,
        penalties=penalties,
        device=bench.device.partition(":")[0],
    )
    if is_done(path, mark) and read(path).get("coarse_sha256") in (None, sha256["coarse"]):
        return
    folder = out / "work" / case.study / f"{case.stem}_{mark[:8]}"
    bench = replace(bench, folder=folder, source=Path(source.path), penalties=penalties)
    bench = replace(bench, own_labels=source.synthetic)
    with Watch(interval_s=0.5) as watch:
        participant = Participant.load(participant_path(out, source))
        bench.begin()
        record = study.measure(participant, case.settings, bench)
    if bench.asked_coarse():
        facts["coarse_sha256"] = sha256["coarse"]
    facts |= {"study": case.study, "participant": source.name, "contrast": source.contrast}
    facts |= {"synthetic": source.synthetic, "choosing": source.choosing}
    facts["case_seconds"] = round(watch.usage.seconds, 1)
    facts["case_processor_seconds"] = round(watch.usage.cpu_seconds, 1)
    failure = record.get("failure")  # the table shows it, and the next run repeats the case
    write(path, {"fingerprint": None if failure else mark, **facts, **settings, **record})
    if failure:
        raise BrainpriorError(failure)
    shutil.rmtree(folder, ignore_errors=True)


def fingerprint(**values: Any) -> str:
    """SHA-256 of everything that determines a result."""
    text = json.dumps({"version": VERSION, **values}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def is_done(path: Path, mark: str) -> bool:
    """Whether a result with this fingerprint exists."""
    return path.is_file() and read(path).get("fingerprint") == mark


def read(path: Path) -> Record:
    """Read a record."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def write(path: Path, values: Record) -> None:
    """Write a record; the file is moved into place when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
