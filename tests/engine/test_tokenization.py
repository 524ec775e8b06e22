"""Text -> ids with byte spans: every byte of a text belongs to one token, whatever tokenizes it."""

from __future__ import annotations

import json
import shutil
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from logitmill.engine import Document, pipeline
from logitmill.engine.intake import Intake, Work, prefix_token
from logitmill.engine.recipes import find_recipe
from logitmill.engine.tokenization import Encoding, Tokenizer
from oracles import assert_spans_tile, byte_spellings, byte_tokenizer, constant_model

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
    said = "its vocabulary has 256 ids, and the model's 100; model and tokenizer do not belong"
    with pytest.raises(ValueError, match=said):
        list(pipe.score([" "], prefix="none"))
    (score,) = pipe.score([[1, 2, 3]], prefix="none")
    assert score.record.num_tokens_scored == 2


def test_a_token_that_was_added_beyond_the_model_costs_the_documents_that_spell_it(
    tmp_path: Path,
) -> None:
    """As `<image_soft_token>` of Gemma 3's text models, which no plain text gives."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.add_tokens(["<img>"])
    pipe = pipeline(constant_model(tmp_path, np.zeros(256), tokenizer=tokenizer))
    good, bad = pipe.score(["abc", "a<img>b"], prefix="none")
    assert (good.record.status, good.record.num_tokens_scored) == ("ok", 2)
    assert bad.record.status == "invalid_ids"
    assert bad.record.error == (
        "text: the tokenizer gives token 256, which is not in the model's vocabulary of 256"
    )


# ---- tokenizer.json, whatever class its folder names ------------------------------------------


def byte_level(pre_tokenizer: Any = None, normalizer: Any = None, *, opening: str = "") -> Any:
    """A small byte-level BPE: GPT-2's, or Llama 3's, Qwen's, SmolLM's by its pre-tokenizer."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre_tokenizer is None)
    steps = [bytes_] if pre_tokenizer is None else [pre_tokenizer, bytes_]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *["2023 and 650841823, we'll see"] * 5], trainer)
    after: list[Any] = [processors.ByteLevel(trim_offsets=True)]
    if opening:
        ids = [(opening, backend.token_to_id(opening))]
        after.append(processors.TemplateProcessing(single=f"{opening} $A", special_tokens=ids))
    backend.post_processor = processors.Sequence(after)
    return backend


def spelled_spaces(normalizer: Any, *, opening: str = "<s>") -> Any:
    """A small BPE with bytes for what it does not know: Llama 2's and Gemma's kind."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, processors, trainers

    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizer
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=names, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    # The trainer makes every name special; bytes are ordinary pieces.
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(state))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    if opening:
        ids = [(opening, backend.token_to_id(opening))]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{opening} $A", special_tokens=ids
        )
    return backend


def make_kind(kind: str) -> Any:
    from tokenizers import Regex, normalizers, pre_tokenizers

    words = Regex(r"\p{N}{1,3}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    match kind:
        case "gpt2":
            return byte_level()
        case "llama3":
            return byte_level(pre_tokenizers.Split(words, "isolated"), opening="<s>")
        case "smollm":
            digits = pre_tokenizers.Digits(individual_digits=True)
            return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)]))
        case "qwen":
            return byte_level(pre_tokenizers.Split(words, "isolated"), normalizers.NFC())
        case "lowercase":
            return byte_level(None, normalizers.Sequence([normalizers.Lowercase()]))
        case "llama2":
            both = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            return spelled_spaces(normalizers.Sequence(both))
        case _:
            return spelled_spaces(normalizers.Replace(" ", "▁"))


KINDS = ("gpt2", "llama3", "smollm", "qwen", "lowercase", "llama2", "gemma")
CLASSES = (
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GemmaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "GPTNeoXTokenizerFast",
    "CohereTokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "OwnTokenizer",
)


def write_folder(folder: Path, backend: Any, model_type: str = "llama", **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return {kind: make_kind(kind) for kind in KINDS}


@pytest.mark.parametrize("class_name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_tokenizer_json_whatever_class_is_named(
    kinds: dict[str, Any], tmp_path: Path, kind: str, class_name: str | None
) -> None:
    """transformers 5 rebuilds some classes from their vocabulary (transformers#45920, #45488)."""
    from tokenizers import Tokenizer as Backend

    named = {} if class_name is None else {"tokenizer_class": class_name}
    tokenizer = load(write_folder(tmp_path, kinds[kind], bos_token="<s>", **named))
    file = Backend.from_file(str(tmp_path / "tokenizer.json"))
    file.encode_special_tokens = True
    for text in [*CORPUS[:5], *TEXTS, "2023 and 650841823, we'll see", " a  b\n\n c"]:
        encoding = assert_tiles(tokenizer, text)
        assert encoding.ids.tolist() == file.encode(text, add_special_tokens=False).ids
    assert tokenizer.bos_id == file.token_to_id("<s>")
    assert tokenizer.adds_bos == (kind in ("llama3", "llama2", "gemma"))


@pytest.mark.parametrize("kind", KINDS)
def test_specials_are_text_unless_parsed(kinds: dict[str, Any], tmp_path: Path, kind: str) -> None:
    tokenizer = load(write_folder(tmp_path, kinds[kind], bos_token="<s>", eos_token="</s>"))
    specials = {tokenizer.bos_id, tokenizer.eos_id}
    assert None not in specials
    for text in ("<s>", "<s>the fox</s>", "a <s> b </s>", "漢<s>字"):
        assert not specials & set(assert_tiles(tokenizer, text).ids.tolist())
        parsed = encode(tokenizer, text, parse_special=True)
        assert specials & set(parsed.ids.tolist())
        assert_spans_tile(text, parsed.byte_start.tolist(), parsed.byte_end.tolist())


def test_a_named_special_token_is_special_even_where_tokenizer_json_forgot(
    tmp_path: Path,
) -> None:
    from tokenizers import Tokenizer as Backend

    state = json.loads(make_kind("gpt2").to_str())
    for token in state["added_tokens"]:
        token["special"] = False
    backend = Backend.from_str(json.dumps(state))
    tokenizer = load(write_folder(tmp_path, backend, bos_token="<s>", eos_token="</s>"))
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(encode(tokenizer, "<s></s>").ids.tolist())
    assert encode(tokenizer, "<s>", parse_special=True).ids.tolist() == [tokenizer.bos_id]


def test_code_is_not_needed_beside_a_tokenizer_json(tmp_path: Path) -> None:
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.OwnFast"]}}
    write_folder(tmp_path, make_kind("qwen"), **own)
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    for trust in (False, True):
        tokenizer = Tokenizer.load(tmp_path, trust_remote_code=trust)
        assert tokenizer is not None
        assert_tiles(tokenizer, "the fox")


def test_gpt2_names_its_tokens_in_the_models_config(tmp_path: Path) -> None:
    """Its tokenizer_config.json holds a length and nothing else."""
    write_folder(tmp_path, make_kind("gpt2"), model_max_length=1024)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "bos_token_id": 0, "eos_token_id": 0})
    )
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 0, False)


@pytest.mark.parametrize(
    ("kind", "config", "bos_id", "adds_bos"),
    [
        ("llama3", {"bos_token": "<s>"}, 1, True),
        ("llama3", {"bos_token": "<s>", "add_bos_token": False}, 1, False),
        ("llama3", {"bos_token": None}, 1, True),
        ("gpt2", {"bos_token": "<s>", "add_bos_token": True}, 1, True),
        ("gpt2", {"bos_token": None, "add_bos_token": True}, None, False),
        ("gpt2", {"bos_token": None}, None, False),
        ("gpt2", {"bos_token": "<absent>"}, None, False),
    ],
)
def test_bos_and_the_prefix_are_as_the_folder_says(
    kinds: dict[str, Any],
    tmp_path: Path,
    kind: str,
    config: dict[str, Any],
    bos_id: int | None,
    adds_bos: bool,
) -> None:
    tokenizer = load(write_folder(tmp_path, kinds[kind], eos_token="</s>", **config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, 2)
    assert tokenizer.adds_bos == adds_bos
    assert prefix_token(find_recipe("rolling"), tokenizer) == (2 if bos_id is None else bos_id)
    assert prefix_token(find_recipe("disjoint"), tokenizer) == (bos_id if adds_bos else None)


def test_two_tokens_in_front_are_no_bos(tmp_path: Path) -> None:
    """GLM-4 begins with [gMASK]<sop>, more than a prefix token can say."""
    from tokenizers import processors

    backend = make_kind("gpt2")
    pair = [("<s>", 1), ("<unk>", 3)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=pair
    )
    tokenizer = load(write_folder(tmp_path, backend, eos_token="</s>"))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (None, False)
    with pytest.raises(
        ValueError, match="prefix: 'tokenizer' is '<s><unk>', which the tokenizer puts in front"
    ):
        prefix_token(find_recipe("disjoint"), tokenizer)
    assert prefix_token(find_recipe("disjoint", prefix="none"), tokenizer) is None
    assert prefix_token(find_recipe("rolling"), tokenizer) == tokenizer.eos_id
    assert not {1, 3} & set(encode(tokenizer, "the fox").ids.tolist())


def test_a_vocabulary_and_merges_alone_are_gpt2s(kinds: dict[str, Any], tmp_path: Path) -> None:
    kinds["gpt2"].model.save(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 0, False)
    for text in [*CORPUS[:5], *TEXTS[:6]]:
        expected = kinds["gpt2"].encode(text, add_special_tokens=False).ids
        assert assert_tiles(tokenizer, text).ids.tolist() == expected


def test_a_token_put_behind_is_no_bos(tmp_path: Path) -> None:
    """Qwen3's embedders end in the token that others begin with."""
    from tokenizers import processors

    backend = make_kind("gpt2")
    end = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 0)]
    )
    tokenizer = load(write_folder(tmp_path, backend, bos_token=end, eos_token=end))
    assert (tokenizer.bos_id, tokenizer.adds_bos) == (0, False)


@pytest.mark.parametrize("kind", ["llama3", "llama2", "gemma", "gpt2"])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_scored_chat_has_one_bos(
    kinds: dict[str, Any], tmp_path: Path, kind: str, writes_bos: bool
) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    write_folder(
        constant_model(tmp_path, np.zeros(500)),
        kinds[kind],
        bos_token="<s>",
        eos_token="</s>",
        chat_template=("{{ bos_token }}" if writes_bos else "") + template,
    )
    tokenizer = load(tmp_path)
    intake = Intake(find_recipe("rolling").resolve(64), tokenizer, vocab_size=500)
    messages = [{"role": "user", "content": "the quick fox"}]
    (work,) = intake.take([Document(doc_id="chat", messages=messages)])
    assert isinstance(work, Work)
    assert work.sequence.tolist().count(tokenizer.bos_id) == 1
    assert work.sequence[0] == tokenizer.bos_id
    (text,) = intake.take([Document(doc_id="text", text="<s>the fox")])
    assert isinstance(text, Work)
    assert text.sequence.tolist().count(tokenizer.bos_id) == 1


def test_a_changed_text_leaves_a_space_with_the_word_that_holds_it(tmp_path: Path) -> None:
    """ByteLevel's post-processor trims spaces off the offsets."""
    tokenizer = load(write_folder(tmp_path, make_kind("qwen")))
    text = "cafe\u0301 the fox"
    encoding = assert_tiles(tokenizer, text)
    data = text.encode()
    spans = zip(encoding.byte_start.tolist(), encoding.byte_end.tolist(), strict=True)
    assert b" the" in [data[a:b] for a, b in spans]


def test_a_tokenizer_json_of_an_unknown_kind_is_named(tmp_path: Path) -> None:
    state = json.loads(make_kind("gpt2").to_str())
    state["model"]["type"] = "Unheard"
    write_folder(tmp_path, make_kind("gpt2"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"cannot be loaded: tokenizer\.json: tokenizers"):
        Tokenizer.load(tmp_path)


# ---- a tokenizer.model and nothing else -------------------------------------------------------

SYMBOLS = ["▁▁", "▁▁▁", "▁▁▁▁", "\n\n", "<table>", "<start_of_turn>"]
MODELS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "bpe", "byte_fallback": True},
    "gemma": {
        "model_type": "bpe",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": SYMBOLS,
    },
    "symbols after a prefix": {
        "model_type": "bpe",
        "byte_fallback": True,
        "user_defined_symbols": SYMBOLS,
    },
    "unigram": {"model_type": "unigram", "byte_fallback": True},
    "unigram with symbols": {
        "model_type": "unigram",
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "user_defined_symbols": SYMBOLS,
    },
    "t5": {
        "model_type": "unigram",
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "nfkc": {"model_type": "bpe", "normalization_rule_name": "nfkc"},
}


@pytest.fixture(scope="module", params=MODELS)
def model_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("model")
    settings = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        **MODELS[request.param],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420 if settings.get("byte_fallback") else 120,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    return folder


HARD = ["the<table>fox", "<table> ", "a\n\n\nb", "     x", "<s>the</s>", "<0x0A>", "▁a▁▁b", "ﬁ Å ①"]


@pytest.mark.parametrize("text", [*CORPUS[:5], *TEXTS, *HARD, "  two  gaps  "])
def test_ids_of_a_tokenizer_model_are_sentencepieces_own(model_folder: Path, text: str) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(model_folder / "tokenizer.model")
    )
    encoding = encode(load(model_folder), text)
    assert encoding.ids.tolist() == reference.encode(text)
    assert_spans_tile(text, encoding.byte_start.tolist(), encoding.byte_end.tolist())


def test_ids_of_a_tokenizer_model_for_any_text(model_folder: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(model_folder / "tokenizer.model")
    )
    tokenizer = load(model_folder)
    words = st.sampled_from([*"abcdefthe quick 漢é😀\n\t\u0301", "  ", "<table>", "the ", "<s>"])

    @given(st.lists(words, min_size=1, max_size=40).map("".join))
    def agrees(text: str) -> None:
        if text.replace(" ", "▁") not in SYMBOLS:  # alone, it goes without a dummy prefix
            assert encode(tokenizer, text).ids.tolist() == reference.encode(text)

    agrees()


def test_a_tokenizer_model_names_its_own_bos(model_folder: Path) -> None:
    tokenizer = load(model_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
    assert encode(tokenizer, "<s>", parse_special=True).ids.tolist() == [1]


def test_pieces_that_the_folder_lists_again_stay_pieces(model_folder: Path, tmp_path: Path) -> None:
    """Gemma's tokenizer_config.json lists its runs of spaces, as no text spells them."""
    import sentencepiece

    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [reference.id_to_piece(i) for i in range(reference.get_piece_size())]
    listed = {str(i): {"content": p} for i, p in enumerate(pieces) if set(p) <= {"▁", "\n"}}
    config = {"tokenizer_class": "GemmaTokenizer", "added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load(tmp_path)
    for text in ("a  b", "     x", "a\n\n\nb    ", "▁▁ x"):
        assert assert_tiles(tokenizer, text).ids.tolist() == reference.encode(text)


def test_a_template_and_tokens_beside_a_tokenizer_model(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    config: dict[str, Any] = {
        "tokenizer_class": "InternLM3Tokenizer",
        "auto_map": {"AutoTokenizer": ["own.InternLM3Tokenizer", None]},
        "add_bos_token": False,
        "eos_token": {"content": "<|end|>"},
    }
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0]['content'] + eos_token }}")
    num_pieces = load(model_folder)._backend.get_vocab_size()
    token = {"content": "<|end|>", "special": True}
    for at in (num_pieces, num_pieces + 1):
        config["added_tokens_decoder"] = {str(at): token}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        if at > num_pieces:
            with pytest.raises(ValueError, match=rf"'<\|end\|>' cannot have id {at} after the"):
                Tokenizer.load(tmp_path)
            continue
        tokenizer = load(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, at, False)
        text = tokenizer.render([{"role": "user", "content": "the fox"}])
        assert text == "the fox<|end|>"
        assert encode(tokenizer, text, parse_special=True).ids.tolist()[-1] == at
        assert at not in encode(tokenizer, text).ids.tolist()


# ---- tiktoken.model --------------------------------------------------------------------------

# As in Kimi-K2's tokenization_kimi.py, where it is all that says how text is cut.
CODE = r'''
raise SystemExit("was run")
class TikTokenTokenizer(PreTrainedTokenizer):
    pat_str = "|".join(
        [
            r"""[\p{Han}]+""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?""",
            r"""\p{N}{1,3}""",
            r""" ?[^\s\p{L}\p{N}]+[\r\n]*""",
            r"""\s*[\r\n]+""",
            r"""\s+(?!\S)""",
            r"""\s+""",
        ]
    )
'''
CUT = eval(CODE[CODE.index('"|".join') : CODE.rindex(")") + 1])


def write_tiktoken(folder: Path, *, code: str = CODE) -> Path:
    """A folder as Kimi's, its vocabulary trained on the texts of this file."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    backend = Backend(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(CUT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, bytes_])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    backend.train_from_iterator([Path(__file__).read_text(), *TEXTS * 3], trainer)
    of_character = {spelling: byte for byte, spelling in enumerate(byte_spellings())}
    ids = {bytes(of_character[c] for c in token): i for token, i in backend.get_vocab().items()}
    lines = [b64encode(token) + b" %d" % i for token, i in sorted(ids.items(), key=lambda x: x[1])]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenization_kimi.py").write_text(code)
    at = len(ids)
    added = {at: ("[BOS]", True), at + 1: ("[EOS]", True), at + 4: ("<|im_end|>", False)}
    config = {
        "added_tokens_decoder": {
            str(i): {"content": content, "special": special}
            for i, (content, special) in added.items()
        },
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "tokenizer_class": "TikTokenTokenizer",
        "chat_template": "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "kimi_k2"}))
    return folder


@pytest.fixture(scope="module")
def tiktoken_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tiktoken"))


@pytest.fixture(scope="module")
def conversion(tiktoken_folder: Path) -> Any:
    """transformers' own, but for reading the file, for which it asks for the tiktoken library."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    def read(path: str) -> dict[bytes, int]:
        lines = (line.split() for line in Path(path).read_bytes().splitlines())
        return {b64decode(token): int(i) for token, i in lines}

    converter = TikTokenConverter(str(tiktoken_folder / "tiktoken.model"), pattern=CUT)
    converter.load_tiktoken_bpe = read
    return converter.converted()


@given(st.one_of(st.sampled_from(TEXTS), ANY_TEXT))
def test_ids_of_a_tiktoken_vocabulary_are_those_of_transformers_conversion(
    tiktoken_folder: Path, conversion: Any, text: str
) -> None:
    encoding = assert_tiles(load(tiktoken_folder), text)
    assert encoding.ids.tolist() == conversion.encode(text).ids
    data = text.encode()
    for i, start, end in zip(encoding.ids, encoding.byte_start, encoding.byte_end, strict=True):
        piece = data[start:end].decode(errors="replace")
        assert conversion.decode([int(i)], skip_special_tokens=False) == piece


def test_a_tiktoken_vocabulary_knows_its_special_tokens(tiktoken_folder: Path) -> None:
    tokenizer = load(tiktoken_folder)
    at = tokenizer.num_ids
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (at, at + 1, False)
    text = tokenizer.render([{"role": "user", "content": "the fox"}])
    assert text == "the fox<|im_end|>"
    assert encode(tokenizer, text, parse_special=True).ids.tolist()[-1] == at + 4
    assert encode(tokenizer, text).ids.max() < at


def test_a_tiktoken_vocabulary_without_a_pattern_asks_for_a_tokenizer_json(tmp_path: Path) -> None:
    for code in ("pat_str = make_it()", "pat_str =", "PATTERN = 'x'"):
        write_tiktoken(tmp_path, code=code)
        for trust in (False, True):
            with pytest.raises(ValueError, match=r"a tokenizer\.json is needed"):
                Tokenizer.load(tmp_path, trust_remote_code=trust)


@pytest.mark.parametrize("line", ["IQ== x", "IQ=", "!! 1", "IQ== 1 2"])
def test_a_broken_tiktoken_vocabulary_is_named(line: str, tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tiktoken.model").write_text(f"IQ== 0\n{line}\n")
    with pytest.raises(ValueError, match=r"tiktoken\.model does not hold lines of a token"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_a_tiktoken_vocabulary_of_another_name_asks_for_a_tokenizer_json(
    tmp_path: Path, model_type: str
) -> None:
    """Llama 3's own files."""
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ValueError, match=r"needs? a tokenizer\.json"):
        Tokenizer.load(tmp_path)
