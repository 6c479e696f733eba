"""Options of the commands, as types of their parameters."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

_COMMON = "Common options"


class Device(StrEnum):
    """Where the tensors live."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """Number format of the networks while training."""

    float32 = "32"
    bf16 = "bf16"


class BiasField(StrEnum):
    """What is done about a bias field."""

    auto = "auto"
    n4 = "n4"
    none = "none"


class Intensity(StrEnum):
    """Whose intensity parameters."""

    per_scan = "per-scan"
    shared = "shared"


class Readout(StrEnum):
    """What the label map is the argmax of."""

    marginals = "marginals"
    decoder = "decoder"


Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of all random numbers.", rich_help_panel=_COMMON)]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="auto: a GPU where there is one.", rich_help_panel=_COMMON)
]
PrecisionOption = Annotated[
    Precision, typer.Option("--precision", help="Of the networks in training.", rich_help_panel=_COMMON)
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.", rich_help_panel=_COMMON)]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.", rich_help_panel=_COMMON)]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with a training that was stopped.", rich_help_panel=_COMMON)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="All warnings, and tracebacks of errors.", rich_help_panel=_COMMON)
]
Align = Annotated[str | None, typer.Option(metavar="none|center|rigid|affine", help="How files are brought together.")]
Steps = Annotated[int | None, typer.Option(min=1, metavar="N", help="Training steps.")]
Scans = Annotated[list[str], typer.Argument(metavar="SCAN", help="Scans: files, folders or quoted globs.")]
Suffix = Annotated[str | None, typer.Option(metavar="S", help="Of several contrasts take this one: T1w, FLAIR, ...")]
Participants = Annotated[
    list[str] | None,
    typer.Option("--participant-label", metavar="LABEL", help="Only these: 01 or sub-01; repeat, or 01,02."),
]
Sessions = Annotated[
    list[str] | None, typer.Option("--session-label", metavar="LABEL", help="Only these: 1 or ses-1; repeat, or 1,2.")
]
Mask = Annotated[str, typer.Option(metavar="auto|none|PATH", help="Where scans are observed: auto finds padding.")]
Channels = Annotated[str | None, typer.Option(metavar="A,B", help="Suffixes of the channels of one scan: T1w,FLAIR.")]
ChannelAlign = Annotated[
    str, typer.Option(metavar="rigid|none", help="Channels after the first: registered to it, or by header.")
]
Brain = Annotated[bool, typer.Option("--brain", help="The scans show brains without heads; default: decided by scan.")]
Head = Annotated[bool, typer.Option("--head", help="The scans show whole heads.")]
Objective = Annotated[str | None, typer.Option(metavar="NAME", help="marginal, jensen, trace, enum, iwae.")]
Guide = Annotated[str | None, typer.Option(metavar="NAME", help="mean-field, low-rank.")]
LikelihoodPower = Annotated[
    float | None, typer.Option(metavar="B", help="Voxels count so many times; 1: the model as written.")
]
BiasFieldOption = Annotated[
    BiasField | None, typer.Option("--bias-field", help="Divided out by N4 or not; auto: of whole heads.")
]
Trust = Annotated[
    list[str] | None,
    typer.Option("--trust", metavar="MODULE:NAME", help="Code of others that the model may name; repeat for more."),
]
