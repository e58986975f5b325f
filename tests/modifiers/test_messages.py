"""Datasets of conversations: made into tokens by the chat template, or one error that says what to do."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from moe_collab import MoeCollabError

from .calibration_rows import own_cache, texts, watch  # noqa: F401 (a fixture)
from .conftest import load, run

PRUNE = {"ExpertPruningModifier": {"retention": 0.75}}
CHAT = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def conversations(count=6):
    rows = [[{"role": "user", "content": row[:9]}, {"role": "assistant", "content": row}] for row in texts(count)]
    return Dataset.from_dict({"messages": rows, "source": ["web"] * count})


def processor_of(path, template=CHAT):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("limit", [None, 20])
def test_conversations_become_tokens_by_the_chat_template(limit, tiny):
    path = tiny("qwen3_moe")
    model, processor = load(path), processor_of(path)
    seen = watch(model)
    data = conversations()
    run(model, PRUNE, data=data, processor=processor, max_seq_length=limit)
    expected = {
        tuple(processor(f"<eos><user>{row[:9]}<assistant>{row}", add_special_tokens=False)["input_ids"][:limit])
        for row in texts(6)
    }
    assert seen == expected and all(row[0] == 256 and 256 not in row[1:] for row in seen)
    assert processor.backend_tokenizer.truncation is None


def test_your_own_preprocessing_goes_first(tiny):
    path = tiny("qwen3_moe")
    model = load(path)
    seen = watch(model)
    first = lambda sample: {"text": sample["messages"][0]["content"]}  # noqa: E731
    data = conversations()
    run(model, PRUNE, data=data, processor=processor_of(path), preprocessing_func=first, max_seq_length=64)
    assert seen == set(map(tuple, AutoTokenizer.from_pretrained(path)([row[:9] for row in texts(6)])["input_ids"]))


def test_conversations_without_a_template_and_columns_of_no_use(tiny):
    path = tiny("qwen3_moe")
    with pytest.raises(MoeCollabError, match=r"\['messages', 'source'\].*has no chat template"):
        run(path, PRUNE, data=conversations(), processor=processor_of(path, None))
    fussy = processor_of(path, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(MoeCollabError, match=r"does not take the conversation \[\{.*roles must alternate"):
        run(path, PRUNE, data=conversations(), processor=fussy)
    data = Dataset.from_dict({"prompt_text": texts(4), "score": [1.0] * 4})
    with pytest.raises(MoeCollabError, match=r"\['prompt_text', 'score'\] is input_ids, text or messages"):
        run(path, PRUNE, data=data, processor=processor_of(path))
