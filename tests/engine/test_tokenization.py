"""Text -> ids with byte spans: every byte of a text belongs to one token, whatever tokenizes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine import pipeline
from logitmill.engine.tokenization import Encoding, Tokenizer
from oracles import assert_spans_tile, byte_tokenizer, constant_model

TEXTS = [
    "plain ascii, twice  spaced",
    " leading and trailing \n",
    "naïve café déjà-vu",
    "漢字かな交じり文",
    "emoji 👩‍👩‍👧 and 😀 split over bytes",
    "decomposed e\u0301 and a\u030a, and \u0958 that grows under NFC",
    "e\u0301" * 3 + "\u0958",
    "<s> </s> <|bos|> [UNK] are only words here",
    "\x00 and \r\n and \u2028",
]
ANY_TEXT = st.text(min_size=1, max_size=60)


def encode(tokenizer: Tokenizer, text: str, **settings: Any) -> Encoding:
    (encoding,) = tokenizer.encode([text], **settings)
    return encoding


def assert_tiles(tokenizer: Tokenizer, text: str) -> Encoding:
    encoding = encode(tokenizer, text)
    assert_spans_tile(text, encoding.byte_start.tolist(), encoding.byte_end.tolist())
    return encoding


@pytest.fixture(scope="module")
def demo_tokenizer(demo_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(demo_folder)
    assert tokenizer is not None
    return tokenizer


# ---- byte-level vocabularies -----------------------------------------------------------------


@given(ANY_TEXT)
def test_byte_level_spans_are_the_tokens_own_bytes(demo_tokenizer: Tokenizer, text: str) -> None:
    encoding = assert_tiles(demo_tokenizer, text)
    data = text.encode()
    backend = demo_tokenizer._backend
    for i, start, end in zip(encoding.ids, encoding.byte_start, encoding.byte_end, strict=True):
        assert backend.decode([int(i)], skip_special_tokens=False) == data[start:end].decode(
            errors="replace"
        )


def test_an_emoji_that_is_split_is_shared_out_byte_by_byte() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    encoding = assert_tiles(tokenizer, "a😀b")
    assert encoding.ids.tolist() == list("a😀b".encode())
    assert encoding.byte_start.tolist() == list(range(6))


@pytest.mark.parametrize("text", TEXTS)
def test_a_special_token_spelled_in_a_text_is_text(demo_tokenizer: Tokenizer, text: str) -> None:
    encoding = assert_tiles(demo_tokenizer, text)
    specials = {demo_tokenizer.bos_id, demo_tokenizer.eos_id}
    assert not specials & set(encoding.ids.tolist())


def test_special_tokens_of_a_rendered_chat_are_tokens(demo_tokenizer: Tokenizer) -> None:
    text = "<|bos|># user: hi"
    parsed = encode(demo_tokenizer, text, parse_special=True)
    assert parsed.ids[0] == demo_tokenizer.bos_id
    assert_spans_tile(text, parsed.byte_start.tolist(), parsed.byte_end.tolist())
    assert encode(demo_tokenizer, text).ids[0] != demo_tokenizer.bos_id, "and text again after"


def test_nothing_is_added_and_nothing_is_cut(demo_folder: Path, tmp_path: Path) -> None:
    """A stored tokenizer may carry the truncation and the padding of whoever saved it."""
    shutil.copytree(demo_folder, tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    state["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    cut, plain = Tokenizer.load(tmp_path), Tokenizer.load(demo_folder)
    assert cut is not None
    assert plain is not None
    text = "def function(argument): return argument + 1"
    np.testing.assert_array_equal(encode(cut, text).ids, encode(plain, text).ids)
    assert plain.adds_bos
    assert encode(plain, text).ids[0] != plain.bos_id


# ---- tokenizers that change the text ---------------------------------------------------------


def with_normalizer(normalizer: Any) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizer
    return Tokenizer(tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_spans_tile_under_nfc(text: str) -> None:
    from tokenizers import normalizers

    assert_tiles(with_normalizer(normalizers.NFC()), text)


@given(ANY_TEXT)
def test_spans_tile_under_nfkc_and_lowercase(text: str) -> None:
    from tokenizers import normalizers

    both = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer = with_normalizer(both)
    encoding = encode(tokenizer, text)
    if len(encoding.ids):
        assert_spans_tile(text, encoding.byte_start.tolist(), encoding.byte_end.tolist())


def test_a_change_that_keeps_the_number_of_bytes_does_not_shift_spans() -> None:
    """Three composed accents lose a byte each, one composition exclusion gains three."""
    from tokenizers import normalizers

    text = "e\u0301" * 3 + "\u0958" + "end"
    tokenizer = with_normalizer(normalizers.NFC())
    encoding = assert_tiles(tokenizer, text)
    starts = encoding.byte_start.tolist()
    borders = {len(text[:i].encode()) for i in range(len(text) + 1)}
    assert set(starts) <= borders, "a span begins inside a character"
    last = encoding.ids.tolist().index(ord("e"), 4)
    assert starts[last:] == [12, 13, 14]


@given(ANY_TEXT)
def test_spans_tile_for_a_metaspace_vocabulary_with_unknowns(text: str) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "▁", *map(chr, range(97, 123)), "▁a", "he", "the"]
    model = models.Unigram([(p, -float(len(pieces) - len(p))) for p in pieces], unk_id=0)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert_tiles(tokenizer, text)


# ---- sentencepiece, as InternLM2 ships it ----------------------------------------------------

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "pack my box with five dozen liquor jugs",
    "def score(text): return model(text).logits",
    "    if x == 10:  # two  spaces",
    "naïve café 漢字",
] * 20
INTERNLM2_CONFIG = {
    "added_tokens_decoder": {
        "0": {"content": "<unk>", "special": True, "normalized": False},
        "1": {"content": "<s>", "special": True, "normalized": False},
        "2": {"content": "</s>", "special": True, "normalized": False},
        "3": {"content": "<|im_start|>", "special": True, "normalized": False},
        "4": {"content": "<|im_end|>", "special": True, "normalized": False},
    },
    "auto_map": {
        "AutoTokenizer": [
            "tokenization_internlm2.InternLM2Tokenizer",
            "tokenization_internlm2_fast.InternLM2TokenizerFast",
        ]
    },
    "bos_token": "<s>",
    "chat_template": (
        "{{ bos_token }}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' "
        "+ message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    ),
    "clean_up_tokenization_spaces": False,
    "decode_with_prefix_space": False,
    "eos_token": "</s>",
    "pad_token": "</s>",
    "sp_model_kwargs": None,
    "tokenizer_class": "InternLM2Tokenizer",
    "unk_token": "<unk>",
}


@pytest.fixture(scope="module", params=["dummy prefix", "no prefix", "one space"])
def internlm2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer folder in InternLM2's layout: no tokenizer.json, code that must not be run."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("internlm2")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=request.param != "no prefix",
        remove_extra_whitespaces=request.param == "one space",
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        split_digits=True,
        control_symbols=["[UNUSED_TOKEN_1]", "[UNUSED_TOKEN_2]"],
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(INTERNLM2_CONFIG))
    (folder / "tokenization_internlm2.py").write_text("raise SystemExit('was run')")
    (folder / "tokenization_internlm2_fast.py").write_text("raise SystemExit('was run')")
    config = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("text", [*CORPUS[:5], *TEXTS, "   ", "a", "\n\n\t", "  two  gaps  "])
def test_internlm2_ids_are_sentencepieces_own(internlm2: Path, text: str) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(internlm2 / "tokenizer.model"))
    tokenizer = load(internlm2)
    encoding = encode(tokenizer, text)
    assert encoding.ids.tolist() == reference.encode(text)
    if len(encoding.ids):
        assert_spans_tile(text, encoding.byte_start.tolist(), encoding.byte_end.tolist())


def test_internlm2_of_any_text(tmp_path: Path, internlm2: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(internlm2 / "tokenizer.model"))
    tokenizer = load(internlm2)

    @given(st.text("abc thequick 漢é😀\n\t\u0301", min_size=1, max_size=50))
    def agrees(text: str) -> None:
        assert encode(tokenizer, text).ids.tolist() == reference.encode(text)

    agrees()


def test_internlm2_puts_bos_in_front_and_knows_its_chat_tokens(internlm2: Path) -> None:
    tokenizer = load(internlm2)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    text = tokenizer.render([{"role": "user", "content": "the fox"}])
    assert text == "<s><|im_start|>user\nthe fox<|im_end|>\n"
    ids = encode(tokenizer, text, parse_special=True).ids.tolist()
    assert ids[:2] == [1, 3]
    assert ids.count(4) == 1
    assert not {1, 3, 4} & set(encode(tokenizer, text).ids.tolist()), "in a text they are text"


def test_internlm2_scores_text(internlm2: Path, tmp_path: Path) -> None:
    shutil.copytree(internlm2, tmp_path, dirs_exist_ok=True)
    constant_model(tmp_path, np.zeros(400))
    (score,) = pipeline(tmp_path, device="cpu").score(["the quick brown fox"])
    assert score.record.num_bytes == 19
    assert score.record.bits_per_byte == pytest.approx(
        score.record.num_tokens * np.log2(400) / 19, rel=1e-6
    )


def test_sentencepiece_that_is_not_installed_says_what_to_install(
    internlm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitmill.engine import tokenization

    monkeypatch.setattr(tokenization, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'logitmill\[sentencepiece\]'"):
        Tokenizer.load(internlm2)


@pytest.mark.parametrize("data", [b"", b"not a model at all", b"\x0a\xff\xff\xff"])
def test_a_broken_sentencepiece_model_is_named(
    internlm2: Path, tmp_path: Path, data: bytes
) -> None:
    shutil.copytree(internlm2, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ValueError, match="cannot be loaded") as raised:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(raised.value)


# ---- folders ---------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_scores_ids_and_refuses_text(tmp_path: Path) -> None:
    constant_model(tmp_path, np.zeros(30))
    assert Tokenizer.load(tmp_path) is None
    pipe = pipeline(tmp_path, device="cpu")
    (score,) = pipe.score([[1, 2, 3]])
    assert score.record.num_tokens_scored == 2
    assert score.record.num_bytes == 0
    assert score.record.bits_per_byte is None
    for document in ("text", [{"role": "user", "content": "hi"}]):
        with pytest.raises(ValueError, match="tokenizer: the model folder has none"):
            list(pipe.score([document]))


def test_a_tokenizer_that_brings_other_code_asks_for_trust(tmp_path: Path) -> None:
    constant_model(tmp_path, np.zeros(30))
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="trust_remote_code"):
        pipeline(tmp_path, device="cpu")


def test_a_broken_tokenizer_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    constant_model(tmp_path, np.zeros(30))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer: ") as raised:
        pipeline(tmp_path, device="cpu")
    assert str(tmp_path) in str(raised.value)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    """Ids clamped in silence (Soup#681) would score something else."""
    pipe = pipeline(constant_model(tmp_path, np.zeros(100), tokenizer=byte_tokenizer()))
    with pytest.raises(ValueError, match="model and tokenizer do not belong together"):
        list(pipe.score(["zzz"], prefix="none"))
