"""Compare this package with transformers on your own weights.

Runs both on built-in texts in ten languages, pictures, a video and a set to rerank, and prints how
far they are apart. Needs transformers (the extra `verify`); with torchvision and qwen-vl-utils
installed too, the ids and pixels of the official preprocessing are compared as well.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import add_hub_options
from .streams import say

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    from ..config import PixelConfig
    from ..prompt import Prompt
    from .verify_report import Verdict
    from .verify_samples import Sample

# torchvision and qwen-vl-utils are what the official processor needs beside transformers.
_OFFICIAL = ("torchvision", "qwen_vl_utils")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="PATH", help="a checkpoint folder or a hub id")
    parser.add_argument(
        "--kind",
        choices=("auto", "embedder", "reranker", "both"),
        default="auto",
        help="what the checkpoint is; auto goes by its name, or else takes both",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="that both run in; auto is that of the checkpoint, float32 the sharpest test",
    )
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu or cuda:0")
    parser.add_argument(
        "--truth",
        action="store_true",
        help="also run transformers in float32, and see which of the two is nearer to that",
    )
    group = parser.add_argument_group("published numbers of Qwen3-VL-Embedding-2B")
    group.add_argument(
        "--published",
        action="store_true",
        help="compare with them; done without asking where the name and the sizes are that model's",
    )
    group.add_argument(
        "--picture",
        metavar="FILE",
        help="the picture of the official example, for the rest of them",
    )
    group.add_argument("--fetch-picture", action="store_true", help="download that picture")
    add_hub_options(parser)


def run(options: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint, locate
    from ..config import load_config
    from ..dispatch import choose_device
    from . import published
    from .info import own_dtype
    from .verify_report import TOLERANCES, Verdict
    from .verify_samples import embed_samples, rerank_samples

    if options.picture is not None:
        with open(options.picture, "rb"):  # one that is not there is found before the work
            pass
    version = _transformers_version()
    folder = locate(options.model, revision=options.revision, local_files_only=options.offline)
    config = load_config(folder)
    kinds = _kinds(options.kind, f"{options.model} {folder.name}")
    published_too = "embedder" in kinds and (
        options.published or published.is_published(str(options.model), config)
    )
    if (options.picture is not None or options.fetch_picture) and not published_too:
        raise ValueError(
            "--picture and --fetch-picture are for the published numbers of an embedder: give "
            "--published too"
        )
    dtype = own_dtype(Checkpoint(folder)) if options.dtype == "auto" else options.dtype
    if dtype not in TOLERANCES:
        raise ValueError(f"the weights are {dtype}: give --dtype {', '.join(TOLERANCES)}")
    device = choose_device(options.device)
    import torch

    print(f"{options.model}: {' and '.join(kinds)}, {dtype} on {device}")
    print(f"qvlfast {_own_version()}, transformers {version}, torch {torch.__version__}")
    verdict = Verdict([])
    found: dict[str, tuple[list[Sample], list[Prompt], NDArray[np.float32]]] = {}
    answers = (0, 0)
    for kind in kinds:
        samples = embed_samples() if kind == "embedder" else rerank_samples()
        _say(f"running the {kind} here")
        prompts, values, answers = _ours(kind, options.model, options, dtype, samples)
        found[kind] = (samples, prompts, values)
    _compare_prompts(folder, found, version, verdict)
    _compare_models(folder, dtype, device, found, answers, options.truth, verdict)
    if published_too:
        published.compare(options, dtype, verdict)
    if verdict.failures:
        print(f"\nFAILED: {', '.join(verdict.failures)}")
        return 1
    print("\npassed")
    return 0


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """transformers' model in ``dtype``, with scaled-dot-product attention."""
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa"
    )
    return model.eval().to(device)


def reference_hidden(model: Any, prompt: Prompt, pixels: PixelConfig | None = None) -> Tensor:
    """The final hidden state of the last token, ``[hidden_size]``, in the model's dtype.

    transformers' ``Qwen3VLModel`` on the ids and pixels of ``prompt``; it computes the positions
    itself.

    Args:
        pixels: how pixels are normalised; None is by a mean and a deviation of 0.5.
    """
    import numpy as np
    import torch

    from ..config import PixelConfig

    half = (0.5, 0.5, 0.5)
    pixels = pixels or PixelConfig(half, half)
    config = model.config
    device = next(model.parameters()).device
    ids = torch.from_numpy(prompt.ids.astype(np.int64))[None].to(device)
    kinds = torch.zeros_like(ids, dtype=torch.int32)
    kinds[ids == config.image_token_id] = 1
    kinds[ids == config.video_token_id] = 2
    inputs: dict[str, Tensor] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": kinds,
    }
    for is_video, values, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        media = [m for m in prompt.media if m.is_video == is_video]
        if media:
            temporal = config.vision_config.temporal_patch_size
            rows = [float_pixels(m.pixels, is_video, temporal, pixels) for m in media]
            inputs[values] = torch.from_numpy(np.concatenate(rows)).to(device)
            inputs[grid] = torch.tensor([m.grid for m in media], device=device)
    with torch.inference_mode():
        hidden: Tensor = model.model(**inputs).last_hidden_state[0, -1]
    return hidden


def float_pixels(
    values: NDArray[np.uint8], is_video: bool, temporal: int, pixels: PixelConfig
) -> NDArray[np.float32]:
    """uint8 patches as the reference's processor lays them out: normalised, a still as equal
    frames, ``[N, 3 · temporal · patch²]``."""
    import numpy as np

    frames = values.reshape(len(values), 3, temporal if is_video else 1, -1)
    frames = np.repeat(frames, 1 if is_video else temporal, axis=2).astype(np.float32)
    mean, std = (np.asarray(x, np.float32).reshape(1, 3, 1, 1) for x in (pixels.mean, pixels.std))
    normalised: NDArray[np.float32] = (frames / np.float32(255) - mean) / std
    return normalised.reshape(len(values), -1)


def reference_vectors(
    model: Any, prompts: Sequence[Prompt], pixels: PixelConfig | None = None
) -> NDArray[np.float32]:
    """Unit vectors ``[N, D]`` float32."""
    import torch

    hidden = torch.stack([reference_hidden(model, prompt, pixels) for prompt in prompts])
    unit: NDArray[np.float32] = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu().numpy()
    return unit


def reference_scores(
    model: Any,
    prompts: Sequence[Prompt],
    answer_ids: tuple[int, int],
    pixels: PixelConfig | None = None,
) -> NDArray[np.float32]:
    """Scores ``[N]`` float32: sigmoid(h · (W[yes] − W[no]))."""
    import torch

    yes, no = (model.lm_head.weight[i].detach().float() for i in answer_ids)
    hidden = torch.stack([reference_hidden(model, prompt, pixels) for prompt in prompts])
    scores: NDArray[np.float32] = torch.sigmoid(hidden.float() @ (yes - no)).cpu().numpy()
    return scores


def _say(what: str) -> None:
    """Large models take minutes: say what they are spent on."""
    say(f"qvlfast: {what}")


def _transformers_version() -> str:
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "verify compares with transformers, which is not installed: pip install "
            "'qvlfast[verify]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return str(transformers.__version__)


def _own_version() -> str:
    from .. import __version__

    return __version__


def _kinds(kind: str, name: str) -> list[str]:
    from ..checkpoint import named_kind

    if kind == "auto":
        kind = named_kind(name) or "both"
    return ["embedder", "reranker"] if kind == "both" else [kind]


def _ours(
    kind: str, model: str, options: argparse.Namespace, dtype: str, samples: Sequence[Sample]
) -> tuple[list[Prompt], NDArray[np.float32], tuple[int, int]]:
    """Prompts and answers of this package, and the ids of ``yes`` and ``no``."""
    from .. import Embedder, Reranker

    arguments: dict[str, Any] = {
        "device": options.device,
        "dtype": dtype,
        "revision": options.revision,
        "local_files_only": options.offline,
    }
    values = [sample.value for sample in samples]
    if kind == "embedder":
        with Embedder.from_pretrained(model, **arguments) as embedder:
            prompts = [embedder._prepare(value, None) for value in values]
            return prompts, embedder.encode(values), (0, 0)
    with Reranker.from_pretrained(model, **arguments) as reranker:
        prompts = [reranker._prepare_pair(value, None) for value in values]
        token_id = reranker._runtime.prompter.token_id
        return prompts, reranker.predict(values), (token_id("yes"), token_id("no"))


def _compare_models(
    folder: Path,
    dtype: str,
    device: torch.device,
    found: Mapping[str, tuple[list[Sample], list[Prompt], NDArray[np.float32]]],
    answers: tuple[int, int],
    truth: bool,
    verdict: Verdict,
) -> None:
    import torch

    from ..config import load_pixel_config
    from .verify_report import TOLERANCES, print_scores, print_truth, print_vectors

    pixels = load_pixel_config(folder)

    def reference(in_dtype: str) -> dict[str, NDArray[np.float32]]:
        _say(f"running transformers in {in_dtype}")
        try:
            model = load_reference(folder, getattr(torch, in_dtype), device)
        except Exception as error:  # versions differ in what they read, and in how they say no
            raise ValueError(
                f"transformers does not load this checkpoint ({type(error).__name__}: {error}); "
                "config.json may be written for another version of it"
            ) from error
        results = {}
        for kind, (_, prompts, _) in found.items():
            if kind == "embedder":
                results[kind] = reference_vectors(model, prompts, pixels)
            else:
                results[kind] = reference_scores(model, prompts, answers, pixels)
        return results

    theirs = reference(dtype)
    exact = reference("float32") if truth and dtype != "float32" else {}
    for kind, (samples, prompts, ours) in found.items():
        print(f"\n{'vectors' if kind == 'embedder' else 'scores'}")
        names = [sample.name for sample in samples]
        tokens = [len(prompt.ids) for prompt in prompts]
        show = print_vectors if kind == "embedder" else print_scores
        show(names, tokens, ours, theirs[kind], TOLERANCES[dtype], verdict)
        if kind in exact:
            print_truth(kind, ours, theirs[kind], exact[kind], verdict)


def _compare_prompts(
    folder: Path,
    found: Mapping[str, tuple[list[Sample], list[Prompt], NDArray[np.float32]]],
    version: str,
    verdict: Verdict,
) -> None:
    """Ids of texts with transformers' tokenizer, and with its processor everything."""
    from .verify_prompts import official_prompt

    print("\nprompts")
    tokenizer, processor, reason = _load_official(folder)
    if processor is None:
        print(f"  pixels, and ids of pictures and videos: not compared ({reason})")
    excused = int(version.partition(".")[0]) >= 5
    counts = {"ids": 0, "pixels": 0}
    for kind, (samples, prompts, _) in found.items():
        for sample, prompt in zip(samples, prompts, strict=True):
            if processor is None and prompt.media:
                continue
            ids, pixels = official_prompt(processor, tokenizer, kind, sample.value)
            same_ids = ids == prompt.ids.tolist()
            if not (excused and sample.video):
                verdict.check(f"ids of {sample.name}", same_ids)
                counts["ids"] += same_ids
            if prompt.media:
                same_pixels = _same_pixels(folder, prompt, pixels)
                verdict.check(f"pixels of {sample.name}", same_pixels)
                counts["pixels"] += same_pixels
    print(f"  {counts['ids']} prompts have the ids of transformers' own")
    if processor is not None:
        print(f"  {counts['pixels']} prompts have the pixels of the official preprocessing")
    if excused and any(sample.video for samples, *_ in found.values() for sample in samples):
        print(
            f"  excused: transformers {version} keeps the template's start and end markers around "
            "a video; 4.57, which\n  the models were published with, does not. Both models below "
            "run on the ids of 4.57"
        )


def _load_official(folder: Path) -> tuple[Any, Any, str]:
    """transformers' tokenizer, and its processor; or None and why there is none."""
    from transformers import AutoTokenizer, Qwen3VLProcessor

    from ..template import Template
    from .verify_prompts import template_of

    template = template_of(Template(folder).path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    absent = [name for name in _OFFICIAL if importlib.util.find_spec(name) is None]
    if absent:
        return tokenizer, None, f"it needs {' and '.join(absent)}"
    try:
        processor = Qwen3VLProcessor.from_pretrained(folder, padding_side="right")
    except Exception as error:  # files it wants and this package does not, or other versions
        return tokenizer, None, f"its processor does not load: {str(error).splitlines()[0]}"
    processor.chat_template = template
    return tokenizer, processor, ""


def _same_pixels(folder: Path, prompt: Prompt, theirs: NDArray[np.float32]) -> bool:
    import numpy as np

    from ..config import load_config, load_pixel_config

    temporal = load_config(folder).vision.temporal_patch_size
    pixels = load_pixel_config(folder)
    media = [float_pixels(m.pixels, m.is_video, temporal, pixels) for m in prompt.media]
    ours = np.concatenate(media)
    # A level is 1/127.5; the two may divide in another order.
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < 1e-5)
