"""The command `ppl-seg`: thin wrappers of the Python API. What is heavy is imported inside the commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from ppl_seg import __version__
from ppl_seg.cli_options import (
    Align,
    BiasFieldOption,
    Brain,
    ChannelAlign,
    Channels,
    Device,
    DeviceOption,
    Force,
    Guide,
    Head,
    Intensity,
    LikelihoodPower,
    Mask,
    Objective,
    Participants,
    Precision,
    PrecisionOption,
    Readout,
    Resume,
    Scans,
    Seed,
    Sessions,
    Steps,
    Suffix,
    Threads,
    Trust,
    Verbose,
)
from ppl_seg.cli_support import NOTHING_DONE, fail, guarded, say, show_summary, show_table, watched

app = typer.Typer(
    help="Label maps teach an anatomical prior; unlabelled scans of any contrast get segmentations with uncertainty.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line `args` (default: the process's) and exit."""
    # OpenMP reads this when torch is loaded: threads that wait sleep instead of spinning. Where other work
    # keeps a core busy, small steps are then several times quicker; on an idle machine it costs nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch: large tensors on huge pages, where Linux offers them on request. Trainings take a quarter less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        code = app(args=args, prog_name="ppl-seg", standalone_mode=False)
    except Exception as error:
        # bad usage: an exception of click, which typer carries under a name that depends on its version
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "ppl-seg")
        say(f"{error.format_message().rstrip('.')}; see {command} --help")
        code = NOTHING_DONE
    raise SystemExit(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ppl-seg {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
@guarded
def prior(
    label_maps: Annotated[
        list[str], typer.Argument(metavar="LABEL_MAP", help="Label maps: files, folders or quoted globs.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the model.")],
    labels: Annotated[
        Path | None, typer.Option(metavar="TSV", help="Label table: index, name, optional class, color.")
    ] = None,
    value_map: Annotated[
        Path | None, typer.Option("--map", metavar="TSV", help="Values replaced first: from, to; 0 drops.")
    ] = None,
    merge_sides: Annotated[bool, typer.Option("--merge-sides", help="Join left and right.")] = False,
    spacing: Annotated[
        float | None, typer.Option(metavar="MM", help="Voxel size of the prior's grid; default: the maps'.")
    ] = None,
    align: Align = None,
    shape: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="convolutional, warp or a decoder's import path; default: by the maps."),
    ] = None,
    latent_dim: Annotated[int | None, typer.Option(min=1, metavar="N", help="Dimensions of a decoder's shape.")] = None,
    guide: Annotated[str, typer.Option(metavar="NAME", help="mean-field, low-rank.")] = "mean-field",
    objective: Annotated[str, typer.Option(metavar="marginal|trace", help="KL analytic or sampled.")] = ("marginal"),
    participant_label: Participants = None,
    session_label: Sessions = None,
    steps: Steps = None,
    label_steps: Annotated[
        int, typer.Option(min=0, metavar="N", help="Training steps of a label guide on simulated scans; default: none.")
    ] = 0,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
    threads: Threads = None,
    resume: Resume = False,
    force: Force = False,
    verbose: Verbose = False,
) -> None:
    """Learn an anatomical prior from label maps."""
    from ppl_seg import api

    api.learn_prior(
        label_maps,
        out=out,
        labels=labels,
        value_map=value_map,
        merge_sides=merge_sides,
        spacing=spacing,
        align=align,
        shape=shape,
        latent_dim=latent_dim,
        guide=guide,
        objective=objective,
        participants=_labels(participant_label),
        sessions=_labels(session_label),
        steps=steps,
        label_steps=label_steps,
        seed=seed,
        device=device.value,
        precision=precision.value,
        resume=resume,
        force=force,
        progress=watched(),
    )
    typer.echo(out)


@app.command()
@guarded
def fit(
    scans: Scans,
    prior: Annotated[Path, typer.Option(metavar="DIR", help="Model of `ppl-seg prior`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the new model.")],
    suffix: Suffix = None,
    mask: Mask = "auto",
    channels: Channels = None,
    participant_label: Participants = None,
    session_label: Sessions = None,
    recipe: Annotated[
        str, typer.Option(metavar="NAME", help="default, or notes: the journal club notes' own model.")
    ] = "default",
    objective: Objective = None,
    guide: Guide = None,
    intensity: Annotated[Intensity | None, typer.Option(help="Intensity parameters of each scan, or of all.")] = None,
    likelihood_power: LikelihoodPower = None,
    bias_field: BiasFieldOption = None,
    align: Align = None,
    channel_align: ChannelAlign = "rigid",
    brain: Brain = False,
    head: Head = False,
    steps: Steps = None,
    label_rounds: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Rounds of the label guide; default 3, for brains and heads 0."),
    ] = None,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.float32,
    threads: Threads = None,
    resume: Resume = False,
    trust: Trust = None,
    force: Force = False,
    verbose: Verbose = False,
) -> int:
    """Fit a model to unlabelled scans of one contrast, under a prior."""
    from ppl_seg import api

    model = api.fit_scans(
        scans,
        prior=prior,
        out=out,
        suffix=suffix,
        mask=mask,
        channels=_split(channels),
        participants=_labels(participant_label),
        sessions=_labels(session_label),
        recipe=recipe,
        objective=objective,
        guide=guide,
        intensity=intensity and intensity.value,
        likelihood_power=likelihood_power,
        bias_field=bias_field and bias_field.value,
        align=align,
        channel_align=channel_align,
        view=_view(brain, head),
        steps=steps,
        label_rounds=label_rounds,
        seed=seed,
        device=device.value,
        precision=precision.value,
        resume=resume,
        trusted=tuple(trust or ()),
        force=force,
        progress=watched(),
    )
    typer.echo(out)
    return int(model.scans_left_out > 0)


@app.command()
@guarded
def segment(
    scans: Scans,
    model: Annotated[Path, typer.Option(metavar="DIR", help="Model of `ppl-seg fit` or `ppl-seg prior`.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")],
    suffix: Suffix = None,
    mask: Mask = "auto",
    channels: Channels = None,
    participant_label: Participants = None,
    session_label: Sessions = None,
    draws: Annotated[int, typer.Option(min=1, metavar="N", help="Draws behind volumes and intervals.")] = 200,
    refine: Annotated[
        int | None, typer.Option(min=0, metavar="STEPS", help="Steps on each scan; 0: the encoder's word.")
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also write the label marginals.")] = False,
    save_draws: Annotated[bool, typer.Option("--save-draws", help="Also write whole segmentations drawn.")] = False,
    readout: Annotated[
        Readout | None,
        typer.Option(help="Argmax of label marginals, or of the decoder; default: the recipe's."),
    ] = None,
    objective: Objective = None,
    guide: Guide = None,
    likelihood_power: LikelihoodPower = None,
    bias_field: BiasFieldOption = None,
    align: Align = None,
    channel_align: ChannelAlign = "rigid",
    brain: Brain = False,
    head: Head = False,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    threads: Threads = None,
    trust: Trust = None,
    force: Force = False,
    verbose: Verbose = False,
) -> int:
    """Segment scans: label maps, volumes and their uncertainty."""
    from ppl_seg import api

    report = api.segment_scans(
        scans,
        model=model,
        out=out,
        suffix=suffix,
        mask=mask,
        channels=_split(channels),
        participants=_labels(participant_label),
        sessions=_labels(session_label),
        draws=draws,
        refine=refine,
        probabilities=probabilities,
        save_draws=save_draws,
        readout=readout and readout.value,
        objective=objective,
        guide=guide,
        likelihood_power=likelihood_power,
        bias_field=bias_field and bias_field.value,
        align=align,
        channel_align=channel_align,
        view=_view(brain, head),
        seed=seed,
        device=device.value,
        trusted=tuple(trust or ()),
        force=force,
        progress=watched(),
    )
    for row in report.rows:
        if row["status"] == "failed":
            scan, message = str(row["scan"]), str(row["message"])
            say(message if scan in message else f"{scan}: {message}")
    rows = [{**row, "quality": row["quality"] and f"{row['quality']:.2f}"} for row in report.rows]
    show_table(("scan", "status", "seconds", "quality", "message"), rows, numbers=("seconds", "quality"))
    say(report.summary)
    return int(report.exit_code)


@app.command()
@guarded
def evaluate(
    segmentations: Annotated[str, typer.Argument(help="Label maps to score: file, folder or quoted glob.")],
    truth: Annotated[str, typer.Argument(help="True label maps: file, folder or quoted glob.")],
    labels: Annotated[Path | None, typer.Option(metavar="TSV", help="Label table that names the structures.")] = None,
    groups: Annotated[
        Path | None, typer.Option(metavar="TSV", help="Values scored as one structure: index, group.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="TSV", help="Scores, a row a scan and structure.")] = None,
    force: Force = False,
    verbose: Verbose = False,
) -> int:
    """Score segmentations against true label maps: Dice, surface distances, volumes."""
    from ppl_seg.results.evaluation import evaluate as score

    evaluation = score(segmentations, truth, labels=labels, groups=groups, out=out, force=force)
    for message in evaluation.messages:
        say(message)
    show_summary(evaluation.summary)
    for path in evaluation.unmatched:
        say(f"{path}: has no counterpart; it is not scored")
    return evaluation.exit_code


@app.command()
@guarded
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the results.")] = Path("ppl_seg_demo"),
    seed: Seed = 0,
    threads: Threads = None,
    verbose: Verbose = False,
) -> None:
    """Simulate subjects from a template, run all commands on them and print what comes out."""
    from ppl_seg import demo as demonstration

    demonstration.run(out, seed=seed)


def _view(brain: bool, head: bool) -> str | None:
    """What --brain and --head say of the scans."""
    if brain and head:
        fail("--brain and --head: give one of them", NOTHING_DONE)
    return "brain" if brain else "head" if head else None


def _split(channels: str | None) -> tuple[str, ...]:
    """`T1w,FLAIR` as a tuple."""
    names = tuple(name.strip() for name in channels.split(",")) if channels is not None else ()
    if "" in names or len(set(names)) < len(names):
        fail(f"--channels {channels}: expected different suffixes such as T1w,FLAIR", NOTHING_DONE)
    return names


def _labels(given: list[str] | None) -> tuple[str, ...]:
    """Labels given one at a time, or several with commas between them."""
    return tuple(label.strip() for part in given or [] for label in part.split(",") if label.strip())
