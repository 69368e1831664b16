"""Modules of each model family, written by hand from the architectures, to compare descriptions with."""

from __future__ import annotations

_BERT = "q k v o ffn_in ffn_out norm norm"
_LLAMA = "q k v o ffn_gate ffn_in ffn_out norm norm"
# family -> stack -> roles of one block, written from the architectures
BLOCKS = {
    "bert": {"encoder": _BERT},
    "roberta": {"encoder": _BERT},
    "deberta-v2": {"encoder": f"{_BERT} other other"},  # projections of the relative positions
    "distilbert": {"": _BERT},
    "electra": {"encoder": _BERT},
    "gpt2": {"": "qkv o ffn_in ffn_out norm norm"},
    "gpt-neox": {"": "qkv o ffn_in ffn_out norm norm"},
    "opt": {"decoder": _BERT},
    "llama": {"": _LLAMA},
    "mistral": {"": _LLAMA},
    "qwen2": {"": _LLAMA},
    "qwen3": {"": f"{_LLAMA} norm norm"},
    "gemma": {"": _LLAMA},
    "gemma2": {"": f"{_LLAMA} norm norm"},
    "gemma3": {"": f"{_LLAMA} norm norm norm norm"},
    "phi3": {"": "qkv o ffn_in ffn_out norm norm"},
    "t5": {"encoder": _BERT, "decoder": f"{_BERT} cross_q cross_k cross_v cross_o norm"},
    "bart": {"encoder": _BERT, "decoder": f"{_BERT} cross_q cross_k cross_v cross_o norm"},
    "vit": {"": _BERT},
}
_BERT_INPUT = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.token_type_embeddings": "embed",
    "embeddings.LayerNorm": "norm",
}
_DEBERTA = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.LayerNorm": "norm",
    "encoder.rel_embeddings": "pos_embed",
}
_DISTIL = {
    "embeddings.word_embeddings": "embed",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.LayerNorm": "norm",
}
_GPT2 = {"wte": "embed", "wpe": "pos_embed", "ln_f": "norm"}
_NEOX = {"embed_in": "embed", "final_layer_norm": "norm"}
_OPT = {
    "decoder.embed_tokens": "embed",
    "decoder.embed_positions": "pos_embed",
    "decoder.final_layer_norm": "norm",
}
_LLAMA_ENDS = {"embed_tokens": "embed", "norm": "norm"}
_T5 = {"shared": "embed", "encoder.final_layer_norm": "norm", "decoder.final_layer_norm": "norm"}
_BART = {
    "shared": "embed",
    "encoder.embed_positions": "pos_embed",
    "encoder.layernorm_embedding": "norm",
    "decoder.embed_positions": "pos_embed",
    "decoder.layernorm_embedding": "norm",
}
_VIT = {"embeddings.patch_embeddings.projection": "embed", "layernorm": "norm"}
_DENSE_HEAD = {"classifier.dense": "other", "classifier.out_proj": "head"}


def _under(prefix: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": role for name, role in names.items()}


# (family, head) -> everything outside the blocks
ENDS = {
    ("bert", "base"): {**_BERT_INPUT, "pooler.dense": "other"},
    ("bert", "classification"): {
        **_under("bert", {**_BERT_INPUT, "pooler.dense": "other"}),
        "classifier": "head",
    },
    ("bert", "masked"): {
        **_under("bert", _BERT_INPUT),
        "cls.predictions.transform.dense": "other",
        "cls.predictions.transform.LayerNorm": "norm",
    },
    ("roberta", "base"): {**_BERT_INPUT, "pooler.dense": "other"},
    ("roberta", "classification"): {**_under("roberta", _BERT_INPUT), **_DENSE_HEAD},
    ("roberta", "masked"): {
        **_under("roberta", _BERT_INPUT),
        "lm_head.dense": "other",
        "lm_head.layer_norm": "norm",
    },
    ("deberta-v2", "base"): _DEBERTA,
    ("deberta-v2", "classification"): {
        **_under("deberta", _DEBERTA),
        "pooler.dense": "other",
        "classifier": "head",
    },
    ("distilbert", "base"): _DISTIL,
    ("distilbert", "classification"): {
        **_under("distilbert", _DISTIL),
        "pre_classifier": "other",
        "classifier": "head",
    },
    ("electra", "base"): {**_BERT_INPUT, "embeddings_project": "other"},
    ("electra", "classification"): {
        **_under("electra", {**_BERT_INPUT, "embeddings_project": "other"}),
        **_DENSE_HEAD,
    },
    ("gpt2", "base"): _GPT2,
    ("gpt2", "classification"): {**_under("transformer", _GPT2), "score": "head"},
    ("gpt2", "causal"): _under("transformer", _GPT2),
    ("gpt-neox", "base"): _NEOX,
    ("gpt-neox", "classification"): {**_under("gpt_neox", _NEOX), "score": "head"},
    ("gpt-neox", "causal"): {**_under("gpt_neox", _NEOX), "lm_head": "head"},
    ("opt", "base"): _OPT,
    ("opt", "classification"): {**_under("model", _OPT), "score": "head"},
    ("opt", "causal"): _under("model", _OPT),
    ("t5", "base"): _T5,
    ("t5", "classification"): {
        **_under("transformer", _T5),
        "classification_head.dense": "other",
        "classification_head.out_proj": "head",
    },
    ("t5", "seq2seq"): _T5,
    ("bart", "base"): _BART,
    ("bart", "classification"): {
        **_under("model", _BART),
        "classification_head.dense": "other",
        "classification_head.out_proj": "head",
    },
    ("bart", "seq2seq"): _under("model", _BART),
    ("vit", "base"): {**_VIT, "pooler.dense": "other"},
    ("vit", "image"): {**_under("vit", _VIT), "classifier": "head"},
}
for _family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3"):
    _tied = _family.startswith("gemma")
    ENDS[_family, "base"] = _LLAMA_ENDS
    ENDS[_family, "classification"] = {**_under("model", _LLAMA_ENDS), "score": "head"}
    ENDS[_family, "causal"] = _under("model", _LLAMA_ENDS) | ({} if _tied else {"lm_head": "head"})

# (family, head) -> embedding and the names that share its weight
TIED = {
    ("bert", "masked"): ("bert.embeddings.word_embeddings", "cls.predictions.decoder"),
    ("roberta", "masked"): ("roberta.embeddings.word_embeddings", "lm_head.decoder"),
    ("gpt2", "causal"): ("transformer.wte", "lm_head"),
    ("opt", "causal"): ("model.decoder.embed_tokens", "lm_head"),
    ("gemma", "causal"): ("model.embed_tokens", "lm_head"),
    ("gemma2", "causal"): ("model.embed_tokens", "lm_head"),
    ("gemma3", "causal"): ("model.embed_tokens", "lm_head"),
    ("t5", "base"): ("shared", "encoder.embed_tokens,decoder.embed_tokens"),
    ("t5", "classification"): (
        "transformer.shared",
        "transformer.encoder.embed_tokens,transformer.decoder.embed_tokens",
    ),
    ("t5", "seq2seq"): ("shared", "encoder.embed_tokens,decoder.embed_tokens,lm_head"),
    ("bart", "base"): ("shared", "encoder.embed_tokens,decoder.embed_tokens"),
    ("bart", "classification"): ("model.shared", "model.encoder.embed_tokens,model.decoder.embed_tokens"),
    ("bart", "seq2seq"): ("model.shared", "model.encoder.embed_tokens,model.decoder.embed_tokens,lm_head"),
}
