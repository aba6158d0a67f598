"""What an expert's files say on their own, without its base."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.filesize import decimal

from mergeready.errors import MergeReadyError, UnsupportedError, listing
from mergeready.experts.adapter_folder import AdapterFormat
from mergeready.experts.delta import LowRank
from mergeready.experts.record import read_record
from mergeready.validation.check import Limits, NotCheckedError, Result, check, failed, passed
from mergeready.validation.subject import Subject
from mergeready.weights.safetensors_folder import SafetensorsFolder
from mergeready.weights.source import WeightSource, chunk_ranges

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FACTOR = re.compile(
    r"(?P<module>.*)\.lora_(?P<kind>embedding_)?(?P<role>[ABab])(?P<rest>\.weight|\.default\.weight|)"
)
_PEFT_SUFFIX = re.compile(r"\.lora_(A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector(\.weight)?)$")
_EXPECTED: Mapping[AdapterFormat, Callable[[str], bool]] = {
    "peft": lambda name: (
        name.startswith("base_model.model.") and (".lora_" not in name or bool(_PEFT_SUFFIX.search(name)))
    ),
    "adapterhub": lambda name: ".loras." in name,
    "mlx": lambda name: name.endswith((".lora_a", ".lora_b", ".m")),
}
_READ_BYTES = 2**20


@check(
    "F001",
    "file",
    "error",
    "its configuration and weight files can be read",
    fix="Save the expert again with save_pretrained, and upload all of its files.",
)
def readable(subject: Subject, limits: Limits) -> Result:
    """Parses configurations, opens every weight file and compares headers with sizes; reads no values."""
    try:
        kind = subject.adapter_kind
        record = read_record(subject.folder)
        described = bool(subject.model_fields) or kind is not None or record is not None
        infos = subject.source.infos
        _ = subject.adapter_config
    except UnsupportedError as error:
        if subject.adapter_fields is None:
            return failed(str(error))
        raise NotCheckedError("F006 failed") from None
    except (MergeReadyError, OSError) as error:
        return failed(str(error))
    if not infos:
        return failed("its weight files hold no tensors")
    if not described:
        return failed(
            "nothing says what its tensors are: no config.json, adapter_config.json or mergeready.json"
        )
    size = decimal(sum(info.nbytes for info in infos.values()))
    return passed(f"{kind or 'full model'}, {len(infos)} tensors, {size}")


@check(
    "F006",
    "file",
    "error",
    "it is a change of weights that can be folded into the base",
    fix="Convert it as the message says, or merge it into its base and share the full model.",
)
def foldable(subject: Subject, limits: Limits) -> Result:
    """Residual bases, gates, multiplicative and prompt methods are no sum of base and delta."""
    try:
        config = subject.adapter_config
    except UnsupportedError as error:
        return failed(str(error))
    if config is None:
        return passed("a full model")
    return passed(f"{subject.adapter_kind} LoRA")


@check(
    "F005",
    "file",
    "warning",
    "its weights are safetensors and nothing else",
    fix="Save as safetensors and delete the pickle files: whoever loads those runs what is inside.",
)
def no_pickles(subject: Subject, limits: Limits) -> Result:
    """Looks at names only; no pickle is opened."""
    found = sorted(
        path.relative_to(subject.folder).as_posix()
        for path in subject.folder.rglob("*")
        if path.suffix.lower() in _PICKLES and path.name != "training_args.bin"
    )
    arguments = sorted(path.name for path in subject.folder.rglob("training_args.bin"))
    if found or arguments:
        return failed(f"pickle files: {listing([*found, *arguments])}", where=(*found, *arguments))
    if not subject.is_local:
        raise NotCheckedError(
            "pickle files of the hub are not downloaded: look for them in its list of files"
        )
    return passed("no pickle files")


@check(
    "F002",
    "file",
    "error",
    "its LoRA factors pair up and make one rank each",
    fix="Save the adapter again; factors were lost, renamed or exchanged.",
)
def factors_pair(subject: Subject, limits: Limits) -> Result:
    """A is (r, in) and B (out, r) in PEFT and AdapterHub, (in, r) and (r, out) in MLX."""
    if subject.adapter_kind is None:
        raise NotCheckedError("not an adapter")
    source = subject.source
    pairs, alone = _pairs(source)
    wrong = [pair.problem(source, subject.adapter_kind) for pair in pairs]
    problems = [*(f"{name} has no counterpart" for name in alone), *(p for p in wrong if p is not None)]
    problems += _unexpected_ranks(subject, pairs)
    problems += _unexpected_names(subject)
    if problems:
        return failed(listing(problems), where=tuple(problems))
    return passed(f"{len(pairs)} pairs")


@check(
    "F003",
    "file",
    "error",
    "all values are finite",
    fix="Training diverged or the file is damaged: use an earlier checkpoint, or download it again.",
    cost="values",
)
def finite(subject: Subject, limits: Limits) -> Result:
    """Reads every value once, a megabyte at a time."""
    source = subject.source
    broken = [name for name in source.infos if not _is_finite(source, name)]
    if broken:
        return failed(f"NaN or infinite values in {listing(broken)}", where=tuple(broken), value=len(broken))
    return passed(f"{len(source.infos)} tensors read")


@check(
    "F004",
    "file",
    "error",
    "it was trained: its factors make a change",
    fix="The adapter changes nothing: check that its parameters were in the optimizer and that they were saved.",
    cost="values",
)
def trained(subject: Subject, limits: Limits) -> Result:
    """‖B A‖ = 0 by r × r products; some initialisations start with A = 0, so B alone does not tell."""
    if subject.adapter_kind is None:
        raise NotCheckedError("not an adapter; D200 compares full models with their base")
    source = subject.source
    pairs, _ = _pairs(source)
    if not pairs:
        raise NotCheckedError("no LoRA factors")
    still = [pair.module for pair in pairs if pair.norm(source, subject.adapter_kind) == 0]
    others = len(source.infos) - 2 * len(pairs)
    if len(still) == len(pairs) and not others:
        return failed("every pair of factors multiplies to zero", where=tuple(still), value=len(still))
    if still:
        # Not all is lost: a module whose output no loss depends on has no gradient, as a pooler that nothing reads.
        return failed(
            f"{len(still)} of {len(pairs)} modules change nothing: {listing(still)}",
            where=tuple(still),
            value=len(still),
            fix="Look at the named modules: were they in the optimizer, were they saved, does the loss depend on them?",
            severity="warning",
        )
    return passed(f"all {len(pairs)} modules change")


@dataclass(frozen=True)
class _Pair:
    module: str
    A: str
    B: str

    def problem(self, source: WeightSource, kind: str) -> str | None:
        a, b = source.infos[self.A].shape, source.infos[self.B].shape
        if len(a) < 2 or len(b) < 2:
            return f"{self.module} has factors of shapes {a} and {b}"
        ranks = (a[-1], b[0]) if kind == "mlx" else (a[0], b[1])
        fused = kind == "adapterhub" and ranks[0] in (2 * ranks[1], 3 * ranks[1])  # blocks of q, k and v
        if ranks[0] != ranks[1] and not fused:
            return f"{self.module} has ranks {ranks[0]} and {ranks[1]} (shapes {a} and {b})"
        return None

    def rank(self, source: WeightSource, kind: str) -> int:
        shape = source.infos[self.A].shape or (0,)
        return shape[-1] if kind == "mlx" else shape[0]

    def norm(self, source: WeightSource, kind: str) -> float:
        a, b = source.read(self.A).float(), source.read(self.B).float()
        if not a.any() or not b.any():
            return 0.0
        if a.ndim < 2 or b.ndim < 2:
            return math.nan  # F002 says so
        A, B = (a.flatten(1), b.flatten(1)) if kind != "mlx" else (a.T, b.T)
        if A.shape[0] != B.shape[1]:
            return math.nan  # F002 says so, or they are blocks of a fused weight
        return LowRank(B, A, (B.shape[0], A.shape[1])).norm()


def _pairs(source: WeightSource) -> tuple[list[_Pair], list[str]]:
    """Factors by module, and those without a counterpart. Stacks of experts hold several of a name; all are listed."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for name in source.infos:
        match = _FACTOR.fullmatch(name)
        if match:
            key = (match["module"], match["kind"] or "")
            found.setdefault(key, {})[match["role"].upper()] = name
    pairs = [_Pair(module, roles["A"], roles["B"]) for (module, _), roles in found.items() if len(roles) == 2]
    alone = [name for roles in found.values() if len(roles) == 1 for name in roles.values()]
    return pairs, alone


def _unexpected_ranks(subject: Subject, pairs: list[_Pair]) -> Iterator[str]:
    """Ranks that no entry of the configuration explains."""
    fields, kind = subject.adapter_fields, subject.adapter_kind
    if fields is None or kind in (None, "adapterhub") or fields.get("target_parameters"):
        return
    settings = fields.get("lora_parameters") if kind == "mlx" else fields
    settings = settings if isinstance(settings, Mapping) else {}
    by_module = settings.get("rank_pattern")
    allowed = [settings.get("rank" if kind == "mlx" else "r")]
    allowed += by_module.values() if isinstance(by_module, Mapping) else ()
    for pair in pairs:
        rank = pair.rank(subject.source, kind)
        if rank not in allowed:
            known = ", ".join(map(str, sorted(allowed, key=str)))
            yield f"{pair.module} has rank {rank}, the configuration says {known}"


def _unexpected_names(subject: Subject) -> Iterator[str]:
    """Names that the adapter's library does not write."""
    expected = _EXPECTED[subject.adapter_kind or "peft"]
    if subject.adapter_kind == "mlx" and (subject.adapter_fields or {}).get("fine_tune_type") == "full":
        return
    yield from (f"{name} is not a name of this format" for name in subject.source.infos if not expected(name))


def _is_finite(source: WeightSource, name: str) -> bool:
    info = source.infos[name]
    if not (info.dtype.is_floating_point or info.dtype.is_complex):
        return True
    size = _READ_BYTES // info.dtype.itemsize
    buffer = torch.empty(
        min(size, info.numel), dtype=info.dtype
    )  # fresh memory for each piece would cost more
    for start, stop in chunk_ranges(info, size):
        if isinstance(source, SafetensorsFolder):
            values = buffer[: stop - start]
            source.read_into(name, start, values)
        else:
            values = source.read_flat(name, start, stop)
        if info.dtype.itemsize == 1 or info.dtype.is_complex:
            values = torch.view_as_real(values) if info.dtype.is_complex else values.float()
        # NaN and infinity stay in a sum, which is the fastest pass there is; finite values may overflow in one.
        if math.isfinite(values.sum()):
            continue
        low, high = torch.aminmax(values)
        if not (math.isfinite(low) and math.isfinite(high)):
            return False
    return True
