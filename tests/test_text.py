"The tokenizer on texts that wish it ill, and on the world's own captions."
import json
from random import Random

import pytest
import torch

from minisora.core import generator
from minisora.text import Tokenizer, is_punctuation, split
from minisora.world import World

WORDS = ["a", "blue", "circle", "red", ",", "42", "été"]


def normal(text): return " ".join(split(text))


def there_and_back(tokenizer, texts): return tokenizer.decode(tokenizer.encode(texts)[0])


@pytest.mark.parametrize("block", range(0, 0x110000, 0x10000))
def test_every_character_survives(block):
    signs = [chr(i) for i in range(block, block + 0x10000) if not 0xD800 <= i < 0xE000]
    texts = ["".join(signs[i : i + 256]) for i in range(0, len(signs), 256)]
    assert there_and_back(Tokenizer(WORDS), texts) == list(map(normal, texts))


def test_any_mixture_survives_with_any_vocabulary():
    r = Random(0)
    signs = [*WORDS, " ", "\t\n", "\u3000", "?", "!!", "teal", "x12", "_", "ß", "İ", "Σ", "e\u0301", "赤", "👩‍👩‍👧", "\x00", "\x1c"]
    texts = ["".join(r.choices(signs, k=r.randrange(12))) for _ in range(3000)]
    for tokenizer in (Tokenizer(WORDS), Tokenizer([]), Tokenizer.from_texts(texts)):
        assert there_and_back(tokenizer, texts) == list(map(normal, texts))
    assert len({tuple(row) for row in Tokenizer(WORDS).encode(texts)[0].tolist()}) == len(set(map(normal, texts)))  # and no two become one


@pytest.mark.parametrize("level", ["none", "short", "medium", "long", "full", "pixels"])
def test_the_worlds_captions_survive_to_the_letter(level):
    world = World()
    captions = world.caption(world.sample(200, generator(0)), level)
    tokenizer = Tokenizer.from_texts(captions)
    assert there_and_back(tokenizer, captions) == captions
    assert not any(map(tokenizer.unknown, captions))


def test_layout_of_ids_and_mask():
    ids, mask = Tokenizer(WORDS).encode(["a RED circle", "a é", ""])
    assert ids.dtype == torch.long and mask.dtype == torch.bool
    assert ids.tolist() == [[257, 260, 259], [257, 1 + 0xC3, 1 + 0xA9], [0, 0, 0]]
    assert mask.tolist() == [[True] * 3, [True] * 3, [False] * 3]
    assert Tokenizer(WORDS).vocab_size == 257 + len(WORDS)
    assert Tokenizer(WORDS).encode(["a"], length=4)[0].tolist() == [[257, 0, 0, 0]]
    assert [x.shape for x in Tokenizer(WORDS).encode([], length=4)] == [(0, 4)] * 2
    assert Tokenizer(WORDS).encode([""])[0].shape == (1, 1)  # attention needs one key to mask


def test_vocabulary_is_the_same_for_the_same_words_and_after_json():
    texts = ["a red circle", "two blue circles, a red one"]
    tokenizer = Tokenizer.from_texts(texts)
    assert tokenizer.words == [",", "a", "blue", "circle", "circles", "one", "red", "two"]
    assert Tokenizer.from_texts(reversed(texts * 3)).words == tokenizer.words
    again = Tokenizer(json.loads(json.dumps(tokenizer.words)))
    assert again.encode(texts)[0].equal(tokenizer.encode(texts)[0])


def test_unknown_words_once_in_order():
    assert Tokenizer(WORDS).unknown("Teal circle, a dodecahedron; teal!") == ["teal", "dodecahedron", ";", "!"]
    assert Tokenizer(WORDS).unknown("a RED circle") == []
    assert all(map(is_punctuation, "!…»;_")) and not any(map(is_punctuation, ["🔴", "+", "→", "_x", "42", "été"]))


def test_bytes_that_a_model_made_up_are_shown_not_hidden():
    assert Tokenizer(WORDS).decode([[257, 1 + 0xFF, 260]]) == ["a \ufffd red"]
    assert Tokenizer(WORDS).decode(torch.tensor([[0, 257, 0, 260]])) == ["a red"]


def test_nothing_is_cut_in_silence():
    tokenizer = Tokenizer(WORDS)
    with pytest.raises(ValueError, match="'a red circle' has 3 tokens: expected at most 2"): tokenizer.encode(["a", "a red circle"], length=2)
    assert tokenizer.encode(["a red circle"], length=2, truncate=True)[0].tolist() == [[257, 260]]


@pytest.mark.parametrize("call, says", [
    (lambda t: t.encode("a red circle"), "texts is the single string"),
    (lambda t: t.encode([b"a red circle"]), "texts holds b'a red circle'"),
    (lambda t: t.encode(["\udc80"]), "not valid Unicode"),
    (lambda t: t.decode([[t.vocab_size]]), "expected 0 to 263"),
    (lambda t: t.decode([[-1]]), "ids holds -1"),
    (lambda t: t.decode([1, 2]), r"expected \(b l\)"),
    (lambda t: t.unknown(["a"]), r"text holds \['a'\]"),
    (lambda t: Tokenizer("red"), "words is the single string"),
    (lambda t: Tokenizer(["Red"]), "'Red'"),
    (lambda t: Tokenizer(["red circle"]), "'red circle'"),
    (lambda t: Tokenizer([""]), "''"),
    (lambda t: Tokenizer(["red", "red"]), "1 duplicates"),
    (lambda t: Tokenizer.from_texts("a red circle"), "texts is the single string"),
])
def test_mistakes_are_named(call, says):
    with pytest.raises(ValueError, match=says): call(Tokenizer(WORDS))
