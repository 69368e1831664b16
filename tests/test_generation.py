"""Generated texts: against rows without padding, a plain loop of the no-repeat rule, and folded weights."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import lorascope as ls
from lorascope.adapters.delta import attached_deltas
from lorascope.inputs import tasks
from lorascope.inputs.tokenization import encode_pairs
from lorascope.training.generation import Generation, NoRepeats, generate_texts, group_references, require_generation

MEANINGS = {
    "name : Zizzi": "Zizzi is a pub",
    "name : Zizzi | rating : 5 out of 5": "Zizzi has 5 out of 5",
    "name : Aromi | rating : 1 out of 5 | food : Chinese": "Aromi serves Chinese food | rated 1 out of 5",
    "food : Chinese": "Chinese food is food is food is food",
    "name : Aromi | type : pub | food : English | area : city": "the pub Aromi serves English food in the city",
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of the meanings."""
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    words += sorted({word for text in [*MEANINGS, *MEANINGS.values()] for word in text.split()})
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


@pytest.fixture(scope="module")
def writer(tokenizer):
    """Tiny GPT-2 that has learned the texts of the meanings."""
    model = tiny("gpt2", vocab_size=len(tokenizer), n_positions=64)
    rows = pd.DataFrame({"prompt": list(MEANINGS), "response": list(MEANINGS.values())})
    encoded = encode_pairs(tokenizer, rows, (), 64, seq2seq=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(**encoded.batch(range(len(rows)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def by_row(model, tokenizer, **options) -> list[str]:
    """Generate each text with transformers only, without padding."""
    texts = []
    for prompt in MEANINGS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": tokenizer.eos_token_id} | options
        output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        texts.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return texts


def write_texts(model, tokenizer, prompts=tuple(MEANINGS), **options) -> list[str]:
    return generate_texts(model, tokenizer, prompts, Generation(**{"max_new_tokens": 10} | options), 64)


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
    for model in (writer, tiny("gpt2", vocab_size=len(tokenizer), n_positions=64)):
        names = {"no_repeat_ngram": "no_repeat_ngram_size"}
        settings = {names.get(name, name): value for name, value in options.items() if name != "no_repeat_scope"}
        assert write_texts(model, tokenizer, batch_size=batch_size, **options) == by_row(model, tokenizer, **settings)


def loop_without_repeats(model, tokenizer, prompt: str, size: int) -> str:
    """Choose the most probable token that repeats no n-gram of those generated so far."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids: list[int] = []
    while len(ids) < 10:
        with torch.no_grad():
            order = model(torch.tensor([prompt_ids + ids])).logits[0, -1].argsort(descending=True).tolist()
        earlier = [ids[start : start + size] for start in range(len(ids) - size + 1)]
        ids.append(next(token for token in order if [*ids, token][-size:] not in earlier))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_no_repeat_rule_over_generated_tokens_equals_a_plain_loop(writer, tokenizer, size):
    for model in (writer, tiny("gpt2", vocab_size=len(tokenizer), n_positions=64)):
        expected = [loop_without_repeats(model, tokenizer, prompt, size) for prompt in MEANINGS]
        assert write_texts(model, tokenizer, no_repeat_ngram=size) == expected


def test_no_repeat_rule_begins_at_the_position_of_its_row_for_each_beam():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, (6, 12), generator=generator)
    starts = np.array([0, 9, 4])  # two beams each
    scores = NoRepeats(3, starts)(ids, torch.zeros(6, 3))
    expected = torch.zeros(6, 3)
    for beam, token in itertools.product(range(6), range(3)):
        text = [*ids[beam, starts[beam // 2] :].tolist(), token]
        earlier = [text[start : start + 3] for start in range(len(text) - 3)]
        if text[-3:] in earlier:
            expected[beam, token] = -math.inf
    assert torch.equal(scores, expected)
    assert 0 < scores.isinf().sum() < scores.numel()


def test_no_repeat_rule_may_repeat_the_prompt_unless_its_scope_is_all(writer, tokenizer):
    prompt = "name : Zizzi | rating : 5 out of 5"
    assert write_texts(writer, tokenizer, [prompt], no_repeat_ngram=4) == ["Zizzi has 5 out of 5"]
    (other,) = write_texts(writer, tokenizer, [prompt], no_repeat_ngram=4, no_repeat_scope="all")
    assert other.startswith("Zizzi has 5 out of")
    assert other != "Zizzi has 5 out of 5"


def test_adapted_model_generates_the_texts_of_its_folded_weights(tokenizer):
    for method in (ls.LoRA(rank=4, targets=("q", "v")), ls.LoRA(rank=4, dropout=0.5, targets="all-linear")):
        model = tiny("gpt2", vocab_size=len(tokenizer), n_positions=64)
        before = write_texts(model, tokenizer)
        method.attach(model)
        for delta in attached_deltas(model).values():
            for parameter in delta.parameters():
                torch.nn.init.normal_(parameter)
        model.train()  # without dropout all the same
        texts = write_texts(model, tokenizer, num_beams=2)
        assert model.training
        ls.fold(model)
        assert texts == write_texts(model, tokenizer, num_beams=2)
        assert texts != before


def test_text_ends_before_the_first_stop_string(writer, tokenizer):
    prompt = ["name : Aromi | type : pub | food : English | area : city"]
    assert write_texts(writer, tokenizer, prompt, stop=("food in", "serves")) == ["the pub Aromi"]
    assert write_texts(writer, tokenizer, prompt, stop=("food in",)) == ["the pub Aromi serves English"]


def test_stop_string_of_one_token_ends_a_beam_as_the_end_of_text_does(tokenizer):
    model = tiny("gpt2", seed=1, vocab_size=len(tokenizer), n_positions=64)
    ends = [tokenizer.eos_token_id, tokenizer("Zizzi")["input_ids"][0]]
    expected = by_row(model, tokenizer, num_beams=3, eos_token_id=ends)
    texts = write_texts(model, tokenizer, num_beams=3, stop=("Zizzi",))
    assert texts == [text.removesuffix("Zizzi").strip() for text in expected]
    # Texts that are only cut there differ.
    uncut = by_row(model, tokenizer, num_beams=3)
    assert texts != [text.partition("Zizzi")[0].strip() for text in uncut]


def test_settings_of_the_checkpoint_change_no_text(writer, tokenizer):
    expected = write_texts(writer, tokenizer)
    stored = writer.generation_config.to_dict()
    try:
        writer.generation_config.update(do_sample=True, temperature=9.0, top_k=3, repetition_penalty=5.0, num_beams=2)
        assert write_texts(writer, tokenizer) == expected
    finally:
        writer.generation_config.update(**stored)


def test_long_prompt_is_truncated_at_its_beginning(writer, tokenizer):
    prompt = "name : Aromi | " * 30 + "name : Zizzi"
    assert generate_texts(writer, tokenizer, [prompt], Generation(max_new_tokens=10), 3) == ["Zizzi is a pub"]
    # The tokens to generate need positions, too.
    tokens = tokenizer(prompt)["input_ids"][-54:]
    expected = by_row_of_ids(writer, tokenizer, tokens)
    assert generate_texts(writer, tokenizer, [prompt], Generation(max_new_tokens=10), 512) == [expected]
    with pytest.raises(ValueError, match=r"^max_new_tokens must be below 64, the positions of the model, got 64$"):
        generate_texts(writer, tokenizer, [prompt], Generation(max_new_tokens=64), 512)


def by_row_of_ids(model, tokenizer, tokens: list[int]) -> str:
    ids = torch.tensor([tokens])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=10, eos_token_id=2)
    return tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)


def test_rows_with_one_prompt_are_one_item_with_their_references():
    rows = pd.DataFrame({"prompt": list("abcab"), "response": [" 1", "2 ", "3", "4", "5"], "group": list("xyxxy")})
    items = group_references(rows)
    assert items["prompt"].tolist() == ["a", "b", "c"]
    assert items["references"].tolist() == [["1", "4"], ["2", "5"], ["3"]]
    assert items["group"].tolist() == ["x", "y", "x"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_beams": 0}, "num_beams must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ({"every": -1}, "every must be >= 0, got -1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be >= 0, got -1"),
        ({"no_repeat_scope": "prompt"}, "no_repeat_scope must be one of 'generated', 'all', got 'prompt'"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number, got nan"),
        ({"stop": "\n"}, "stop must be a tuple of non-empty strings, got '\\n'"),
        ({"stop": ("",)}, "stop must be a tuple of non-empty strings, got ('',)"),
    ],
)
def test_invalid_field_raises_one_line(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Generation(**fields)


def test_a_model_or_task_that_cannot_generate_raises_one_line(reviews):
    rows = pd.DataFrame({"prompt": [f"a{number}" for number in range(60)], "response": "b"})
    prompts = tasks.from_frame(rows, "x.csv")
    require_generation(tiny("gpt2"), prompts)
    for family, task, message in [
        ("bert", reviews, "cannot generate with BertForSequenceClassification: it has no language model head"),
        ("gpt2", reviews, "cannot generate for reviews: its answers are classes; omit generation"),
        ("gpt2", tasks.from_frame(rows[["prompt"]].rename(columns={"prompt": "text"}), "x.csv"),
         "cannot generate for x.csv: it needs the columns prompt and response"),
    ]:  # fmt: skip
        model = tiny(family)
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            require_generation(model, task.fit(model))


@pytest.mark.parametrize("beams", [1, 3])
def test_a_prompt_that_ends_with_the_end_of_text_token_is_continued(tokenizer, beams):
    # As in E2E, where this token is between a meaning and its text.
    model = tiny("gpt2", vocab_size=len(tokenizer), n_positions=64)
    prompts = [f"{prompt}[EOS]" for prompt in MEANINGS]
    rows = pd.DataFrame({"prompt": prompts, "response": list(MEANINGS.values())})
    encoded = encode_pairs(tokenizer, rows, (), 64, seq2seq=False)
    assert encoded.tokens["input_ids"][0].count(tokenizer.eos_token_id) == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(**encoded.batch(range(len(rows)))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert write_texts(model, tokenizer, prompts, num_beams=beams) == list(MEANINGS.values())
