"""Transformers of Hugging Face: one small network of each family, from a configuration, transformed and checked.

    pip install transformers; python -m benchmarks.transformers [--only PATTERN ...] [--again] [--structure]

Nothing is downloaded: the weights are random. Results go to benchmarks/results/transformers.json and
docs/results/transformers.md; families that pass are left out the next time. --structure measures again what needs no
derivatives: which weights respond, ε per example, seconds to transform.
"""

from __future__ import annotations

from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import fxstn
from benchmarks.matrix import COLUMNS, DEFINITION, Matrix, Row, run, share_of, shown_coverage, shown_error, structure_of

VOCABULARY, LENGTH, WIDTH, IMAGE = 40, 7, 16, 16
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = SMALL | {"num_key_value_heads": 1, "head_dim": 8}
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 32,
                       "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
SEQUENCES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
                      "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}  # fmt: skip
VISION: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
                          "image_size": IMAGE, "patch_size": 4}  # fmt: skip
SPEECH: dict[str, Any] = SMALL | {
    "conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4,
    "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
ROTARY = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

# {family: (what it is, class of the model, class of the configuration, its settings)}
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "BERT": ("encoder", "BertForSequenceClassification", "BertConfig", SMALL),
    "RoBERTa": ("encoder", "RobertaForSequenceClassification", "RobertaConfig", SMALL),
    "ELECTRA": ("encoder", "ElectraForSequenceClassification", "ElectraConfig", SMALL | {"embedding_size": 8}),
    "DeBERTa": ("encoder", "DebertaForSequenceClassification", "DebertaConfig",
                SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8}),
    "DeBERTa v2": ("encoder", "DebertaV2ForSequenceClassification", "DebertaV2Config",
                   SMALL | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}),
    "ALBERT": ("encoder", "AlbertForSequenceClassification", "AlbertConfig", SMALL | {"embedding_size": 8}),
    "DistilBERT": ("encoder", "DistilBertForSequenceClassification", "DistilBertConfig",
                   {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24,
                    "max_position_embeddings": 32}),
    "MPNet": ("encoder", "MPNetForSequenceClassification", "MPNetConfig", SMALL),
    "ModernBERT": ("encoder", "ModernBertForSequenceClassification", "ModernBertConfig",
                   SMALL | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4}),
    "Longformer": ("encoder", "LongformerForSequenceClassification", "LongformerConfig", SMALL | {"attention_window": 4}),
    "BigBird": ("encoder", "BigBirdForSequenceClassification", "BigBirdConfig",
                SMALL | {"attention_type": "original_full"}),
    "XLNet": ("encoder", "XLNetForSequenceClassification", "XLNetConfig",
              {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 24}),
    "Funnel": ("encoder", "FunnelForSequenceClassification", "FunnelConfig",
               {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_head": 2, "d_head": 8, "d_inner": 24,
                "block_sizes": [1, 1], "num_decoder_layers": 1}),
    "FNet": ("encoder", "FNetForSequenceClassification", "FNetConfig", SMALL),
    "GPT-2": ("decoder", "GPT2LMHeadModel", "GPT2Config", GPT),
    "GPT-Neo": ("decoder", "GPTNeoForCausalLM", "GPTNeoConfig",
                {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
                 "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 4,
                 "bos_token_id": 1, "eos_token_id": 2}),
    "GPT-NeoX": ("decoder", "GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL),
    "GPT-J": ("decoder", "GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "OPT": ("decoder", "OPTForCausalLM", "OPTConfig",
            {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 24,
             "max_position_embeddings": 32, "word_embed_proj_dim": WIDTH, "pad_token_id": 0, "bos_token_id": 1,
             "eos_token_id": 2}),
    "Llama": ("decoder", "LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": ("decoder", "MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 4}),
    "Qwen 2": ("decoder", "Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Qwen 3": ("decoder", "Qwen3ForCausalLM", "Qwen3Config", GROUPED),
    "Gemma": ("decoder", "GemmaForCausalLM", "GemmaConfig", GROUPED),
    "Gemma 2": ("decoder", "Gemma2ForCausalLM", "Gemma2Config", GROUPED | {"sliding_window": 4}),
    "Phi": ("decoder", "PhiForCausalLM", "PhiConfig", SMALL),
    "Falcon": ("decoder", "FalconForCausalLM", "FalconConfig", SMALL),
    "Bloom": ("decoder", "BloomForCausalLM", "BloomConfig",
              {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": 2, "n_head": 2, "pad_token_id": 0,
               "bos_token_id": 1, "eos_token_id": 2}),
    "MPT": ("decoder", "MptForCausalLM", "MptConfig",
            {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layers": 2, "n_heads": 2, "expansion_ratio": 2, "max_seq_len": 32}),
    "StableLM": ("decoder", "StableLmForCausalLM", "StableLmConfig",
                 SMALL | {"num_key_value_heads": 2, "rope_parameters": ROTARY}),
    "Mixtral": ("mixture of experts", "MixtralForCausalLM", "MixtralConfig",
                GROUPED | EXPERTS | {"num_local_experts": 3}),
    "Qwen 2 MoE": ("mixture of experts", "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
                   GROUPED | EXPERTS | {"num_experts": 3, "moe_intermediate_size": 12,
                                        "shared_expert_intermediate_size": 12}),
    "OLMoE": ("mixture of experts", "OlmoeForCausalLM", "OlmoeConfig", SMALL | EXPERTS | {"num_experts": 3}),
    "T5": ("encoder-decoder", "T5ForConditionalGeneration", "T5Config", T5),
    "BART": ("encoder-decoder", "BartForConditionalGeneration", "BartConfig", SEQUENCES),
    "mBART": ("encoder-decoder", "MBartForConditionalGeneration", "MBartConfig", SEQUENCES),
    "Pegasus": ("encoder-decoder", "PegasusForConditionalGeneration", "PegasusConfig", SEQUENCES),
    "Marian": ("encoder-decoder", "MarianMTModel", "MarianConfig", SEQUENCES),
    "Whisper": ("speech", "WhisperForConditionalGeneration", "WhisperConfig",
                SEQUENCES | {"num_mel_bins": 6, "max_source_positions": 8, "max_target_positions": 16}),
    "Wav2Vec2": ("speech", "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config",
                 SPEECH | {"classifier_proj_size": 8}),
    "HuBERT": ("speech", "HubertForSequenceClassification", "HubertConfig", SPEECH | {"classifier_proj_size": 8}),
    "AST": ("speech", "ASTForAudioClassification", "ASTConfig",
            VISION | {"max_length": 16, "num_mel_bins": 8, "frequency_stride": 4, "time_stride": 4}),
    "ViT": ("vision", "ViTForImageClassification", "ViTConfig", VISION),
    "DeiT": ("vision", "DeiTForImageClassification", "DeiTConfig", VISION),
    "BEiT": ("vision", "BeitForImageClassification", "BeitConfig",
             VISION | {"use_relative_position_bias": True, "layer_scale_init_value": 0.1, "drop_path_rate": 0.0}),
    "DINOv2": ("vision", "Dinov2ForImageClassification", "Dinov2Config", VISION),
    "Swin": ("vision", "SwinForImageClassification", "SwinConfig",
             {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}),
    "Swin v2": ("vision", "Swinv2ForImageClassification", "Swinv2Config",
                {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2],
                 "window_size": 4}),
    "ConvNeXt": ("vision", "ConvNextForImageClassification", "ConvNextConfig",
                 {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}),
    "SegFormer": ("vision", "SegformerForImageClassification", "SegformerConfig",
                  {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16],
                   "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}),
    "CLIP": ("vision and text", "CLIPModel", "CLIPConfig", {"projection_dim": 8}),
    "Mamba": ("state space", "MambaForCausalLM", "MambaConfig",
              {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4}),
    "RWKV": ("state space", "RwkvForCausalLM", "RwkvConfig",
             {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "attention_hidden_size": WIDTH, "num_hidden_layers": 2,
              "context_length": 16, "intermediate_size": 24,
              "rescale_every": 0}),  # else its forward divides its own weights, which is refused
}  # fmt: skip


class LowRank(nn.Module):
    """x W + b + x A B: a frozen layer of GPT-2 with a low-rank change (Hu et al. 2021, LoRA)."""

    def __init__(self, layer: Any, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        size, out = layer.weight.shape
        self.A, self.B = nn.Parameter(torch.randn(size, rank) / 4), nn.Parameter(torch.randn(rank, out) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ (self.A @ self.B)


def low_rank_gpt() -> nn.Module:
    """GPT-2 of two frozen blocks, the attention of each with a low-rank change."""
    model = _network("GPT-2")
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = LowRank(block.attn.c_attn)
    return model


def _network(family: str) -> Any:
    import transformers

    _, name, of_config, settings = FAMILIES[family]
    config = getattr(transformers, of_config)(**settings)
    if family == "CLIP":
        text, vision = SMALL | {"projection_dim": 8}, VISION | {"projection_dim": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, **settings)
    config.use_cache = False  # as in training
    config._experts_implementation = "eager"  # a loop over experts; the others are operators of transformers' own
    return getattr(transformers, name)(config)


def inputs_of(family: str, batch: int = 4) -> dict[str, Tensor]:
    """A batch by the names of the forward."""
    kind, _, _, settings = FAMILIES.get(family, FAMILIES["GPT-2"])
    words = torch.randint(3, VOCABULARY, (batch, LENGTH))
    if family == "Whisper":
        return {"input_features": torch.randn(batch, 6, 16), "decoder_input_ids": words}
    if family == "AST":
        return {"input_values": torch.randn(batch, 16, 8)}
    if kind == "speech":
        return {"input_values": torch.randn(batch, 200)}
    if kind == "vision":
        size = settings.get("image_size", 32)
        return {"pixel_values": torch.randn(batch, 3, size, size)}
    if kind == "vision and text":
        return {"input_ids": words, "pixel_values": torch.randn(batch, 3, IMAGE, IMAGE)}
    if kind == "encoder-decoder":
        return {"input_ids": words, "decoder_input_ids": words[:, :5].clone()}
    if kind == "encoder":
        return {
            "input_ids": words,
            "attention_mask": (torch.arange(LENGTH) < torch.tensor([[7], [6], [7], [5]][:batch])).long(),
        }
    return {"input_ids": words}


def build(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """(a small network of a family with random weights, a batch)."""
    torch.manual_seed(0)
    model = low_rank_gpt() if family == "LoRA" else _network(family)
    return model.train(), inputs_of(family)


def structure(family: str, _: Row) -> Row:
    kind = "decoder, low rank" if family == "LoRA" else FAMILIES[family][0]
    return {"kind": kind} | structure_of(*build(family))


def measure(family: str, seeds: int) -> Row:
    row = structure(family, {})
    model, inputs = build(family)
    report = fxstn.verify(model, inputs, seeds=seeds, trace=row["frontend"])
    return row | {"max_error": report.max_error, "ok": report.ok}


def page(rows: dict[str, Row]) -> str:
    """The table as Markdown."""
    cells = []
    for family in (family for family in NAMES if family in rows):
        row = rows[family]
        if "failed" in row:
            cells.append([family, FAMILIES[family][0], "refused", *[""] * 3, row["failed"].replace("|", "\\|")])
            continue
        per_example = "yes" if row["per_example"] else "no"
        cells.append([family, row["kind"], row["frontend"], shown_coverage(row)[0], per_example, f"{row['transform_s']:.1f}",
                      shown_error(row)])  # fmt: skip
    headers = ["family", "kind", "frontend", COLUMNS[0], "ε per example", "transform, s", "largest relative error"]
    good = sum(row.get("ok", False) for row in rows.values())
    full = sum(share_of(row["scaled"]) >= 0.95 for row in rows.values() if "scaled" in row)
    alone = sum(row.get("per_example", False) for row in rows.values())
    return (
        "# Transformers\n\n"
        f"Small networks of {len(rows)} families of Hugging Face's transformers, from their configurations with random "
        f"weights, transformed with `hparams=None`. {good} pass: in float64, train and eval mode, the emitted tangent equals a "
        f"central difference of the original model to 1e-6. In {full} at least 95 % of the elements of weights respond. "
        f"{alone} take an ε per example.\n\n{DEFINITION} LoRA is GPT-2 with frozen weights and a low-rank change of the "
        "attention of each block. RWKV has `rescale_every=0`: with another number its forward divides its own weights "
        "in eval mode, which is refused. "
        f"Written by `python -m benchmarks.transformers`; torch {torch.__version__.partition('+')[0]}.\n\n"
        f"{tabulate(cells, headers=headers, tablefmt='github', disable_numparse=True)}\n"
    )


NAMES = [*FAMILIES, "LoRA"]

if __name__ == "__main__":
    run(Matrix("transformers", NAMES, measure, structure, page), __doc__ or "")
