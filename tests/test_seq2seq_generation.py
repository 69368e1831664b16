"""Texts of encoder-decoders: against single rows by transformers, a plain loop, folded weights, and whole runs."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from test_generation import MEANINGS, word_tokenizer
from tiny import tiny
from tokenizers import processors

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import models, tasks
from lorascope.inputs.tokenization import encode_pairs
from lorascope.training.generation import Generation, generate_texts, require_generation

START = {"bart": 2, "t5": 0}
"""First token of the decoder: BART's end of text, T5's padding."""
FAMILIES = tuple(START)


@pytest.fixture(scope="module")
def tokenizer():
    """Return a tokenizer with an end-of-text token after each text, as those of BART and T5."""
    words = word_tokenizer()
    ends = [("[EOS]", words.eos_token_id)]
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [EOS]", pair="$A [EOS] $B [EOS]", special_tokens=ends
    )
    return words


def outline(family: str, tokenizer, seed: int = 0):
    tokens = {
        "forced_eos_token_id": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": START[family],
    }
    return tiny(family, seed=seed, vocab_size=len(tokenizer), **tokens).eval()


@pytest.fixture(scope="module", params=FAMILIES)
def writer(request, tokenizer):
    """Tiny encoder-decoder that has learned the texts of the meanings."""
    model = outline(request.param, tokenizer)
    rows = pd.DataFrame({"prompt": list(MEANINGS), "response": list(MEANINGS.values())})
    encoded = encode_pairs(tokenizer, rows, (), 64, seq2seq=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(**encoded.batch(range(len(rows)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def write_texts(model, tokenizer, prompts=tuple(MEANINGS), **options) -> list[str]:
    return generate_texts(model, tokenizer, prompts, Generation(**{"max_new_tokens": 10} | options), 64)


def by_row(model, tokenizer, **options) -> list[str]:
    """Generate each text with transformers only, without padding."""
    texts = []
    for prompt in MEANINGS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        settings = {"max_new_tokens": 10, "do_sample": False} | options
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    return texts


def test_learned_texts_are_generated(writer, tokenizer):
    assert write_texts(writer, tokenizer) == list(MEANINGS.values())


@pytest.mark.parametrize("batch_size", [1, 2, 16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 0.2},
        {"no_repeat_ngram": 2, "no_repeat_scope": "all"},
        {"num_beams": 3, "no_repeat_ngram": 2, "no_repeat_scope": "all"},
    ],
)
def test_texts_of_a_padded_batch_equal_those_of_single_rows(writer, tokenizer, options, batch_size):
    # Random weights end no text early, so that lengths and repetitions matter.
    for model in (writer, outline(writer.config.model_type, tokenizer, seed=1)):
        names = {"no_repeat_ngram": "no_repeat_ngram_size"}
        settings = {names.get(name, name): value for name, value in options.items() if name != "no_repeat_scope"}
        assert write_texts(model, tokenizer, batch_size=batch_size, **options) == by_row(model, tokenizer, **settings)


@pytest.mark.parametrize("size", [2, 3])
def test_no_repeat_rule_equals_a_plain_loop(writer, tokenizer, size):
    for model in (writer, outline(writer.config.model_type, tokenizer, seed=1)):
        expected = []
        for prompt in MEANINGS:
            expected.append(loop_without_repeats(model, tokenizer, prompt, size))
        assert write_texts(model, tokenizer, no_repeat_ngram=size) == expected


def loop_without_repeats(model, tokenizer, prompt: str, size: int) -> str:
    """Choose the most probable token that repeats no n-gram of those generated so far."""
    prompt_ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    ids: list[int] = []
    while len(ids) < 10:
        decoder_ids = torch.tensor([[START[model.config.model_type], *ids]])
        with torch.no_grad():
            logits = model(prompt_ids, decoder_input_ids=decoder_ids).logits[0, -1]
        earlier = [ids[start : start + size] for start in range(len(ids) - size + 1)]
        order = logits.argsort(descending=True).tolist()
        ids.append(next(token for token in order if [*ids, token][-size:] not in earlier))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_model_generates_the_texts_of_its_folded_weights(family, tokenizer):
    model = outline(family, tokenizer)
    before = write_texts(model, tokenizer)
    ls.LoRA(rank=4, dropout=0.5, targets="all-linear").attach(model)
    for delta in attached_deltas(model).values():
        for parameter in delta.parameters():
            torch.nn.init.normal_(parameter)
    model.train()  # without dropout all the same
    texts = write_texts(model, tokenizer, num_beams=2)
    assert model.training
    ls.fold(model)
    assert texts == write_texts(model, tokenizer, num_beams=2)
    assert texts != before


def test_settings_of_the_checkpoint_change_no_text(writer, tokenizer):
    expected = write_texts(writer, tokenizer)
    stored = writer.generation_config.to_dict()
    changed = {
        "num_beams": 2,
        "no_repeat_ngram_size": 2,
        "min_length": 9,
        "length_penalty": 9.0,
        "early_stopping": True,
    }
    try:
        writer.generation_config.update(**changed, encoder_no_repeat_ngram_size=1)
        assert write_texts(writer, tokenizer) == expected
    finally:
        writer.generation_config.update(**stored)


def test_forced_tokens_of_the_checkpoint_stay_as_in_transformers(tokenizer):
    # BART's summaries begin and end with tokens that its configuration forces.
    token = tokenizer("Chinese")["input_ids"][0]
    model = outline("bart", tokenizer)
    model.generation_config.update(forced_bos_token_id=token, forced_eos_token_id=2)
    texts = write_texts(model, tokenizer, num_beams=3)
    assert texts == by_row(model, tokenizer, num_beams=3)
    assert {text.split()[0] for text in texts} == {"Chinese"}


def test_a_long_prompt_is_truncated_at_its_end_as_in_training(writer, tokenizer):
    prompt = "name : Zizzi " + "| food : Chinese " * 40
    first = tokenizer(prompt, truncation=True, max_length=4)["input_ids"]
    assert tokenizer.decode(first) == "name : Zizzi [EOS]"
    assert generate_texts(writer, tokenizer, [prompt], Generation(max_new_tokens=10), 4) == ["Zizzi is a pub"]
    # The decoder has separate positions, so that the tokens to generate take none of the prompt.
    texts = generate_texts(writer, tokenizer, [prompt], Generation(max_new_tokens=10), 64)
    length = int(min(64, models.count_positions(writer)))
    ids = torch.tensor([tokenizer(prompt, truncation=True, max_length=length)["input_ids"]])
    output = writer.generate(ids, max_new_tokens=10, do_sample=False)
    assert texts == [tokenizer.decode(output[0], skip_special_tokens=True)]


def test_a_run_scores_generated_texts(writer, tokenizer, tmp_path):
    prompts = tasks.from_frame(
        pd.DataFrame({"prompt": [f"{prompt} | {number}" for prompt in MEANINGS for number in range(12)],
                      "response": [text for text in MEANINGS.values() for _ in range(12)]}), "meanings"
    )  # fmt: skip
    require_generation(writer, prompts.fit(writer))
    writer.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    run = ls.train(
        str(tmp_path / "writer"), prompts, ls.LoRA(rank=2, lr=1e-3), steps=2, batch_size=4, metric="exact_match",
        generation={"max_new_tokens": 10, "num_beams": 2}, progress=False, device="cpu", root=tmp_path,
    )  # fmt: skip
    texts = run.texts
    assert set(texts["text"]) <= set(MEANINGS.values())
    right = [text in references for text, references in zip(texts["text"], texts["references"], strict=True)]
    assert run.score.values["exact_match"] == sum(right) / len(right) > 0.5
