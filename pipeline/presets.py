"""Random checkpoints of SmolVLM2's architecture: small ones to learn with, full-sized ones to measure with."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.sample.world import PARTS, TOYS, Episode, make_recordings
from schemas.errors import UserError
from schemas.files import replacing_folder, write_text

END_OF_UTTERANCE = "<end_of_utterance>"
_SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),  # padding is <|im_end|>, never the end of an utterance
    *("<fake_token_around_image>", "<image>", "<global-img>", END_OF_UTTERANCE),
]
_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """Dimensions of a checkpoint; ``vocab`` is a lower bound, the tokenizer's own size when that is larger."""

    text: dict[str, Any]
    vision: dict[str, Any]
    scale_factor: int
    longest_edge: int  # of the first resize, as in the released checkpoints
    vocab: int = 0


def _siglip_base(image_size: int) -> dict[str, Any]:
    return {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "image_size": image_size,
        "patch_size": 16,
    }


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, rope_theta: float
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
    }


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        # Drawn at 0.02, which suits a width of 1,000, so narrow a model learns many times slower.
        text={**_llama(128, 4, 4, 4, 384, 10_000.0), "initializer_range": 0.08},
        vision={
            "hidden_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "image_size": 128,
            "patch_size": 16,
        },
        scale_factor=4,
        longest_edge=128,
    ),
    "tiny-grid": Preset(  # to count with: as many tokens a picture as the released ones have, half of tiny's layers
        text={**_llama(128, 2, 4, 4, 384, 10_000.0), "initializer_range": 0.08},
        vision={
            "hidden_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 192,
            "image_size": 128,
            "patch_size": 8,
        },
        scale_factor=2,
        longest_edge=128,
    ),
    "smolvlm2-256m": Preset(_llama(576, 30, 9, 3, 1536, 100_000.0), _siglip_base(512), 4, 2048, 49_280),
    "smolvlm2-500m": Preset(_llama(960, 32, 15, 5, 2560, 100_000.0), _siglip_base(512), 4, 2048, 49_280),
    "smolvlm2-2.2b": Preset(
        text=_llama(2048, 24, 32, 32, 8192, 130_000.0),
        vision={
            "hidden_size": 1152,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "intermediate_size": 4304,
            "image_size": 384,
            "patch_size": 14,
        },
        scale_factor=3,
        longest_edge=1536,
        vocab=49_280,
    ),
}


def init_model(preset: str, out: Path, seed: int = 0) -> None:
    """Write a checkpoint with random weights and its own tokenizer, in the released checkpoints' form.

    Raises:
        UserError: an unknown preset, or a folder that holds something else.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    if out.exists() and not (out / "config.json").is_file():
        raise UserError(f"{out} exists and is not a checkpoint; give another --out")
    import torch
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.utils import logging

    logging.disable_progress_bar()
    chosen = PRESETS[preset]
    tokenizer = train_tokenizer()
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in _TOKEN_ROLES.items()}
    vocab = max(chosen.vocab, len(tokenizer))
    config = SmolVLMConfig(
        text_config={**chosen.text, **ids, "vocab_size": vocab, "tie_word_embeddings": True},
        vision_config=chosen.vision,
        scale_factor=chosen.scale_factor,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmolVLMForConditionalGeneration(config)
    with replacing_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_text(folder / "preprocessor_config.json", json.dumps(_processor(chosen), indent=2) + "\n")


_TOKEN_ROLES = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": END_OF_UTTERANCE,
    "pad_token_id": "<|im_end|>",
}


def _processor(preset: Preset) -> dict[str, Any]:
    return {
        "image_processor_type": "SmolVLMImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"longest_edge": preset.longest_edge},
        "do_image_splitting": True,
        "max_image_size": {"longest_edge": preset.vision["image_size"]},
        "resample": 1,  # Lanczos
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_pad": True,
    }


def train_tokenizer() -> Any:
    """A byte-level BPE that knows the toy world's words; any other text is spelled in bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=2,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token=END_OF_UTTERANCE,
        pad_token="<|im_end|>",
        additional_special_tokens=_SPECIAL_TOKENS,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _sentences() -> list[str]:
    """What an assistant in the toy world reads and says, so that its words become single tokens."""
    episodes: list[Episode] = [e for r in make_recordings(90, seed=0) for e in r.episodes]
    said = [f" {word.text}" for episode in episodes for word in episode.words]
    goals = [f" {verb} the {toy}" for verb, toy in itertools.product(("Assemble", "Disassemble"), TOYS)]
    steps = [f" attach the {c} {k}\n detach the {c} {k}\n Attach Detach" for c, k in PARTS]
    plan = [f"\n{n}. {state}:" for n in range(1, 13) for state in ("to do", "doing", "done")]
    roles = ["System:", "User:", "Assistant:", "\nGoal:", "\nPlan:", " You are a proactive assistant.\n"]
    return [*said, *goals * 4, *steps * 4, *plan * 2, *roles * 8]
