# SPDX-License-Identifier: Apache-2.0
"""The participants' reports and the methods text of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from brainprior_bids import __version__
from brainprior_bids.bids import status
from brainprior_bids.bids.contrasts import through_t1w
from brainprior_bids.bids.query import Scan
from brainprior_bids.engine.samplers import registry
from brainprior_bids.records import (
    MaskSource,
    Origin,
    StructuresSource,
    TemplateRecord,
    WeightsRecord,
)
from brainprior_bids.run.forecast import uncertainty_from
from brainprior_bids.run.logs import LOG
from brainprior_bids.settings import Settings

AGAIN = "The images are not affected; --reports-only writes it again."


def write_documents(subjects: Iterable[str], settings: Settings) -> bool:
    """One HTML page per participant and the methods text; False if one could not be written."""
    from brainprior_bids.reports.methods import of_summary, write_citation
    from brainprior_bids.reports.subject import build_subject_report

    complete = True
    for subject in sorted(subjects):
        try:
            build_subject_report(settings.output_dir, subject)
        except Exception as error:  # the images exist: report the error and continue
            LOG.error("sub-%s: the report could not be written: %s. %s", subject, error, AGAIN)
            LOG.debug("traceback", exc_info=True)
            complete = False
    summaries = status.read_summaries(settings.output_dir)
    methods = [of_summary(summary) for summary in summaries if summary.finished]
    if methods:
        try:
            write_citation(settings.output_dir / "logs", methods)
        except OSError as error:
            LOG.error("the methods text could not be written: %s. %s", error, AGAIN)
            complete = False
    return complete


def write_boilerplate(
    scans: Sequence[Scan], settings: Settings, weights: dict[str, tuple[Path, str]]
) -> int:
    """Write the methods text for a run with these settings.

    The coarse network is named if the run will ask it: in holes, and by the samplers whose network
    is given no measurements.
    """
    from importlib.metadata import version

    from brainprior_bids.anatomy.normalise import metric
    from brainprior_bids.engine.weights import read_weights
    from brainprior_bids.reports.methods import Method, write_citation

    def templates(suffix: str) -> tuple[TemplateRecord, ...]:
        return tuple(
            TemplateRecord(
                space=space,
                address=None,
                image_sha256=None,
                mask_sha256=None,
                metric=metric(suffix).words,
                program=f"ANTsPy {version('antspyx')}",
                agreement=None,
                agreement_affine=None,
            )
            for space in settings.template_spaces
        )

    cards = {
        role: WeightsRecord.from_json(read_weights(path, kind=role)[1]).label
        for role, (path, _) in weights.items()
    }
    if "inpaint" not in settings.task and registry.find(settings.sampler).given_data:
        cards.pop("coarse", None)
    titles = {scan.name.stem for scan in scans if scan.problem is None}
    through = through_t1w([s.name for s in scans if s.name.stem in titles], (), settings)
    methods = [
        Method(
            suffix=scan.name.suffix,
            task=settings.task,
            sampler=settings.sampler,
            n_samples=settings.n_samples,
            calls=registry.find(settings.sampler).calls(settings.n_steps, simple=settings.simple),
            version=__version__,
            mask=Origin(MaskSource(settings.skull_strip)),
            structures=Origin(StructuresSource(settings.parcellation)),
            runs=max(1, len(scan.runs)),
            uncertainty_from=uncertainty_from(
                registry.find(settings.sampler), settings, len(scan.runs)
            ),
            templates=() if scan.name.stem in through else templates(scan.name.suffix),
            in_mni305="MNI305" in settings.output_spaces,
            **cards,
        )
        for scan in scans
        if scan.name.stem in titles
    ]
    for path in write_citation(settings.output_dir / "logs", methods):
        LOG.info("%s", path)
    return 0
