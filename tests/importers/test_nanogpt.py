"""nanoGPT's checkpoints become model folders: the same losses and ids, and nothing in them is executed."""

import json
import math
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import nanogpt_tensors, write_nanogpt
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_hub.checkpoint import CheckpointError, load_model
from nanogpt_hub.families import family_of
from nanogpt_hub.generate import generate
from nanogpt_hub.hub.publish import collect
from nanogpt_hub.importers.nanogpt import build_characters, import_checkpoint, read_meta, read_pickle

TEXT = "to be, or not to be:\nthat is the question\n" * 4
CHARACTERS = sorted(set(TEXT))
ARGS = dict(
    n_layer=2, n_head=2, n_embd=16, block_size=24, bias=True, vocab_size=len(CHARACTERS), dropout=0.1
)  # in nanoGPT's spelling
SETTINGS = dict(dataset="plays", out_dir="/home/me/runs", learning_rate=1e-3, max_iters=5000, wandb_project="secret",
                always_save_checkpoint=False, init_from="scratch")  # fmt: skip


def reference_losses(args: dict, tensors: dict, ids: list[int]) -> torch.Tensor:
    """nanoGPT's forward pass on raw tensors, written out: the cross entropy of each id but the first, (T,)."""

    def linear(name, x):
        return F.linear(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * tensors[f"{name}.weight"] + tensors.get(f"{name}.bias", 0)

    inputs, targets = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    T, D = len(inputs), args["n_embd"] // args["n_head"]
    x = tensors["transformer.wte.weight"][inputs] + tensors["transformer.wpe.weight"][:T]  # (T, C)
    for i in range(args["n_layer"]):
        block = f"transformer.h.{i}"
        q, k, v = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).view(T, 3, -1, D).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(D)  # (H, T, T)
        scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + linear(f"{block}.attn.c_proj", (scores.softmax(-1) @ v).transpose(0, 1).reshape(T, -1))
        h = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    return F.cross_entropy(linear("lm_head", norm("transformer.ln_f", x)), targets, reduction="none")


@pytest.fixture
def files(tmp_path):
    """Writes nanoGPT's two files and returns their paths; `changes` go into the checkpoint."""

    def write(args=ARGS, characters=CHARACTERS, **changes):
        return write_nanogpt(tmp_path, args, characters, **{"config": SETTINGS, **changes})

    return write


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_loss_is_nanogpts(files, tmp_path, bias, prefix):
    args = {**ARGS, "bias": bias}
    tensors = nanogpt_tensors(args)
    checkpoint, meta = files(args, model={prefix + name: tensor for name, tensor in tensors.items()})
    import_checkpoint(checkpoint, tmp_path / "out", meta)
    model, tokenizer = load_model(tmp_path / "out")
    ids = tokenizer.encode(TEXT)[: args["block_size"] + 1]
    assert ids == [CHARACTERS.index(c) for c in TEXT[: len(ids)]]
    logits, loss = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    expected = reference_losses(args, tensors, ids)
    assert loss.item() == pytest.approx(expected.mean().item(), abs=1e-5)
    each = F.cross_entropy(logits[0], torch.tensor(ids[1:]), reduction="none")  # the mean hides which GELU it is
    torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)
    assert family_of(model.config) == ("gpt2", "")


def test_transformers_loads_what_was_imported(files, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint, meta = files({**ARGS, "bias": False})
    found = import_checkpoint(checkpoint, tmp_path / "out", meta)
    ids = torch.tensor([found.tokenizer.encode("to be")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(theirs(ids).logits, found.model(ids)[0], atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("to be")["input_ids"] == ids[0].tolist()
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT


def test_characters_keep_their_ids_and_there_is_no_end_of_text(files, tmp_path):
    characters = ["z", "\n", "é", "🙂", " ", "a"]  # in an order of their own
    checkpoint, meta = files({**ARGS, "vocab_size": len(characters)}, characters)
    tokenizer = import_checkpoint(checkpoint, tmp_path / "out", meta).tokenizer
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eot_id) == ("char", len(characters), None)
    assert tokenizer.encode("".join(characters)) == [*range(len(characters))]
    model, tokenizer = load_model(tmp_path / "out")
    assert len(generate(model, tokenizer, "", max_new_tokens=30, seed=1).text) == 30


def test_gpt2s_vocabulary_needs_no_meta_file(files, tmp_path, gpt2_ranks):
    checkpoint, _ = files({**ARGS, "vocab_size": 50304})
    tokenizer = import_checkpoint(checkpoint, tmp_path / "out").tokenizer
    assert (tokenizer.kind, tokenizer.encode("Hello world")) == ("gpt2", [15496, 995])


def test_what_older_and_changed_nanogpts_wrote(files, tmp_path):
    tensors = nanogpt_tensors(ARGS)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
    own_head = {"lm_head.weight": torch.randn(len(CHARACTERS), 16)}
    args = {name: value for name, value in ARGS.items() if name not in ("dropout", "bias")}
    checkpoint, meta = files(ARGS, model={**tensors, **masks, **own_head}, model_args=args)
    model = import_checkpoint(checkpoint, tmp_path / "out", meta).model
    assert not model.config.tie_word_embeddings
    assert torch.equal(load_model(tmp_path / "out")[0].lm_head.weight, own_head["lm_head.weight"])


@pytest.mark.parametrize("always", [True, False])
def test_the_card_knows_what_the_checkpoint_knew(files, tmp_path, always):
    checkpoint, meta = files(config={**SETTINGS, "always_save_checkpoint": always, "init_from": "gpt2-xl"})
    folder = import_checkpoint(checkpoint, tmp_path / "out", meta).folder
    facts = json.loads((folder / "training" / "run.json").read_text(encoding="utf-8"))
    assert facts["training"]["steps"] == 2000
    assert facts["training"]["hyperparameters"] == {"max_iters": 5000, "learning_rate": 1e-3}
    assert ("evaluation" in facts) is not always  # always saving, the best loss may be of other weights
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ("1.5000" in card) is not always
    for part in ("plays", "base_model: openai-community/gpt2-xl", "2,000"):
        assert part in card
    assert not any(part in card + json.dumps(facts) for part in ("/home", "secret"))
    pushed = collect(folder, "me/plays")
    assert pushed["training/run.json"] == folder / "training" / "run.json"
    assert b"2,000" in pushed["README.md"]


def without(name: str) -> dict:
    return {key: tensor for key, tensor in nanogpt_tensors(ARGS).items() if key != name}


def with_tensor(name: str, tensor) -> dict:
    return {**nanogpt_tensors(ARGS), name: tensor}


FC = "transformer.h.0.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=without(FC)), "'h.0.mlp.c_fc.weight' is missing"),
        (dict(model=without("transformer.wte.weight")), "'wte.weight' is missing"),
        (dict(model=with_tensor("transformer.extra", torch.ones(1))), "'extra' is not part of nanoGPT"),
        (dict(model=with_tensor(FC, torch.ones(3, 4))), r"is \[3, 4\]; its model_args ask for \[64, 16\]"),
        (dict(model=with_tensor(FC, "text")), "'h.0.mlp.c_fc.weight' is str"),
        (dict(model=with_tensor(FC, torch.ones(1).expand(64, 16))), "no plain tensor"),
        (dict(model=with_tensor(FC, torch.ones(64, 16, dtype=torch.long))), "no plain tensor"),
        (dict(model=with_tensor(FC, torch.full((64, 16), math.nan))), "not finite"),
        (dict(model_args={**ARGS, "n_experts": 4}), "have 'n_experts'"),
        (dict(model_args={k: v for k, v in ARGS.items() if k != "n_head"}), "lack 'n_head'"),
        (dict(model_args={**ARGS, "n_layer": 10**9}), "n_layer is 1000000000"),
        (dict(model_args={**ARGS, "n_embd": "wide"}), "n_embd is 'wide'"),
        (dict(model_args={**ARGS, "vocab_size": None}), "vocab_size is None"),
        (dict(model=[]), "no 'model' and 'model_args'"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_sentence(files, tmp_path, changes, message):
    checkpoint, meta = files(**changes)
    with pytest.raises(CheckpointError, match=message) as error:
        import_checkpoint(checkpoint, tmp_path / "out", meta)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["transformer.h.0.attn.c_q.weight", "_orig_mod.smear_gate.weight", "resid_lambdas"])
def test_a_checkpoint_of_nanochat_is_told_from_one_of_nanogpt(name, tmp_path):
    torch.save({name: torch.ones(2)}, tmp_path / "model_000650.pt")
    with pytest.raises(CheckpointError, match="its tensors are those of karpathy's nanochat, which is another model"):
        import_checkpoint(tmp_path / "model_000650.pt", tmp_path / "out")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_runs_nothing(files, tmp_path):
    checkpoint, meta = files(config=Evil(tmp_path / "evil"))
    with pytest.raises(CheckpointError, match=r"it wants to run \w+\.mkdir, and was not opened"):
        import_checkpoint(checkpoint, tmp_path / "out", meta)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "old format"])
def test_a_file_that_is_no_checkpoint(files, tmp_path, damage):
    checkpoint, meta = files()
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes({"cut": whole[: len(whole) // 2], "text": b"to be" * 99}.get(damage, b""))
    if damage == "old format":
        torch.save({"model": {}, "model_args": {}}, checkpoint, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"no whole file of torch\.save") as error:
        import_checkpoint(checkpoint, tmp_path / "out", meta)
    assert "\n" not in str(error.value)


def test_tokenizer_and_model_must_belong_together(files, tmp_path):
    checkpoint, meta = files(characters=CHARACTERS[:-1] + [chr(0x4E00 + i) for i in range(9)])
    with pytest.raises(CheckpointError, match="do not belong together"):
        import_checkpoint(checkpoint, tmp_path / "out", meta)
    with pytest.raises(CheckpointError, match=f"vocab_size is {len(CHARACTERS)}, not GPT-2's.*--meta"):
        import_checkpoint(checkpoint, tmp_path / "out")


def test_nothing_is_overwritten(files, tmp_path):
    checkpoint, meta = files()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is there already"):
        import_checkpoint(checkpoint, tmp_path / "out", meta)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


# ---- the meta file ----

INTEGERS = st.integers(-(2**70), 2**70)
TREES = st.recursive(
    st.none() | INTEGERS | st.text(), lambda inner: st.dictionaries(st.text() | INTEGERS, inner), max_leaves=20
)


@given(value=TREES, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL))
@settings(deadline=None)
def test_pickles_of_plain_values_are_read(value, protocol):
    assert read_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1000, 1001, 5000])
def test_batches_of_entries_as_pickle_writes_them(count):
    value = {"itos": {i: chr(33 + i) for i in range(count)}}
    assert read_pickle(pickle.dumps(value)) == value


@pytest.mark.parametrize(
    ("value", "instruction"),
    [
        (os.mkdir, "STACK_GLOBAL"),
        ([1, 2], "EMPTY_LIST"),
        (1.5, "BINFLOAT"),
        ((), "EMPTY_TUPLE"),
        (True, "NEWTRUE"),
        (b"bytes", "SHORT_BINBYTES"),
    ],
)
def test_other_instructions_are_refused_by_name(value, instruction):
    with pytest.raises(ValueError, match=f"it asks for {instruction}"):
        read_pickle(pickle.dumps({"itos": value}, 4))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_file_runs_nothing(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Evil(tmp_path / "evil")}, protocol))
    with pytest.raises(CheckpointError, match=r"is no meta\.pkl of nanoGPT: it asks for"):
        read_meta(tmp_path / "meta.pkl")
    assert not (tmp_path / "evil").exists()


META = pickle.dumps({"itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}})


@given(at=st.integers(0, len(META) - 1), byte=st.integers(0, 255), cut=st.booleans())
@settings(deadline=None)
def test_damaged_pickles_are_read_or_refused(at, byte, cut):
    data = META[:at] if cut else META[:at] + bytes([byte]) + META[at + 1 :]
    try:
        read_pickle(data)
    except ValueError:
        return
    assert not cut


@pytest.mark.parametrize(
    "meta",
    [
        {}, {"itos": 3}, {"itos": {}}, {"itos": {1: "a", 2: "b"}}, {"itos": {0: "ab"}}, {"itos": {0: 7}}, 5,
        {"itos": {0: "a", 1: "a"}}, {"itos": {0: "\ud800"}},
    ],
    ids=repr,
)  # fmt: skip
def test_meta_files_without_a_vocabulary(tmp_path, meta):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(CheckpointError, match="must give each id from 0 on a character"):
        read_meta(tmp_path / "meta.pkl")


def test_a_huge_meta_file_is_not_read(tmp_path):
    with open(tmp_path / "meta.pkl", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="bytes; at most"):
        read_meta(tmp_path / "meta.pkl")


def test_a_padded_vocabulary_is_fine(files, tmp_path):
    checkpoint, meta = files({**ARGS, "vocab_size": 64})
    found = import_checkpoint(checkpoint, tmp_path / "out", meta)
    assert found.tokenizer.vocab_size == len(CHARACTERS)
    assert build_characters(found.model.config, CHARACTERS).hash == found.tokenizer.hash
