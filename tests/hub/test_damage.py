"""Files that are damaged in the Hub's cache: fetched again where the Hub can be reached, named where it cannot."""

import logging
import os
from pathlib import Path

import pytest
import torch
from helpers import make_model
from huggingface_hub import constants

from nanogpt_hub import cli
from nanogpt_hub.checkpoint import CheckpointError, load_model
from nanogpt_hub.hub.resolve import DamagedError, HubError, Resolved, from_pretrained, resolve
from nanogpt_hub.playground.models import TOKENIZER_FILES, ModelStore
from nanogpt_hub.playground.session import user_message

REPO = "bob/good"
LINE = "is damaged in the cache: fetching it again"
FILES = ["config.json", "model.safetensors", "tokenizer.json"]
IDS = torch.tensor([[1, 2, 3]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = make_model(tmp_path_factory.mktemp("damage") / "model")
    (made / "README.md").write_text("A model.\n", encoding="utf-8")
    return made


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the Hub's client."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(hub, folder, cache, caplog) -> Resolved:
    """A good model that was fetched."""
    caplog.set_level(logging.WARNING)
    hub.add_repo(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    return resolve(REPO)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "truncated": lambda data: data[: len(data) // 2],
    "flipped at the start": lambda data: flip(data, 0),
    "flipped in the middle": lambda data: flip(data, len(data) // 2),
    "emptied": lambda data: b"",
}


def damage(place: Resolved, name: str, how: str) -> Path:
    """Damages a file of the cache; returns where it is stored."""
    blob = (place.folder / name).resolve()
    if how == "missing":
        blob.unlink()
    else:
        blob.write_bytes(DAMAGE[how](blob.read_bytes()))
    return blob


def disconnect(hub) -> None:
    """The Hub does not answer any more."""
    for method in ("GET", "HEAD"):
        hub.fail(method, "/", times=10**6, status=503)


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if LINE in record.getMessage()]


def fetched(hub) -> list[str]:
    """Files of which the content was asked for: small ones at the Hub, large ones at its store."""
    return [Path(request.path).name for place in ("/resolve/", "/cdn/") for request in hub.asked("GET", place)]


def check(model, tokenizer, folder: Path) -> None:
    """The model and its tokenizer are those of the folder."""
    good, its_tokenizer = load_model(folder)
    assert torch.equal(model(IDS)[0], good(IDS)[0])
    assert tokenizer.hash == its_tokenizer.hash


# --- with the Hub -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", [*DAMAGE, "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_fetched_again_and_no_other(hub, place, folder, caplog, name, how):
    damage(place, name, how)
    hub.requests.clear()
    check(*from_pretrained(REPO), folder)
    assert fetched(hub) == [name]
    assert lines(caplog) == ([] if how == "missing" else [f"{name} of {REPO} {LINE}"])
    assert (place.folder / name).read_bytes() == (folder / name).read_bytes()


def test_all_files_at_once(hub, place, folder, caplog):
    for name in FILES:
        damage(place, name, "truncated")
    check(*from_pretrained(REPO), folder)
    assert len(lines(caplog)) == 3


def test_a_file_that_is_damaged_on_the_way_too_is_not_kept(hub, place, folder, capsys):
    blob = damage(place, "model.safetensors", "flipped in the middle")
    hub.corrupt.add("model.safetensors")
    hub.requests.clear()
    assert cli.main(["info", REPO]) == 2
    assert f"model.safetensors of {REPO} is damaged in the cache ({blob})" in capsys.readouterr().err
    assert fetched(hub) == ["model.safetensors"]
    assert not blob.exists()
    hub.corrupt.clear()
    check(*from_pretrained(REPO), folder)


@pytest.mark.parametrize("name", FILES)
def test_what_is_malformed_on_the_hub_is_refused_without_fetching_again(hub, folder, cache, caplog, name):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add_repo(REPO, {**files, name: DAMAGE["truncated"](files[name])})
    for _ in range(2):
        with pytest.raises(CheckpointError):
            from_pretrained(REPO)
    assert fetched(hub).count(name) == 1
    assert lines(caplog) == []


# --- without the Hub --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["truncated", "flipped at the start", "emptied", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_without_the_hub_the_error_names_the_file_and_what_to_do(hub, place, folder, capsys, name, how):
    blob = damage(place, name, how)
    disconnect(hub)
    with pytest.raises(DamagedError):
        from_pretrained(REPO)
    assert cli.main(["generate", REPO, "--prompt", "To", "--max-new-tokens", "3"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"nanogpt-hub: {name} of {REPO} is damaged in the cache ({blob}) and could not be fetched")
    assert said.endswith("then load the model again")
    hub.faults.clear()
    check(*from_pretrained(REPO), folder)


def test_the_hub_comes_back_before_the_damage_is_noticed(hub, place, folder, caplog):
    damage(place, "model.safetensors", "truncated")
    hub.fail("GET", "/api/models/", times=10**6, status=503)
    check(*from_pretrained(REPO), folder)
    assert lines(caplog) == [f"model.safetensors of {REPO} {LINE}"]


def test_a_tokenizer_by_itself(hub, place, folder, caplog):
    damage(place, "tokenizer.json", "flipped in the middle")
    damage(place, "config.json", "flipped in the middle")  # which is not asked for
    disconnect(hub)
    with pytest.raises(DamagedError, match=r"tokenizer\.json"):
        resolve(REPO, files=TOKENIZER_FILES)
    hub.faults.clear()
    again = resolve(REPO, files=TOKENIZER_FILES)
    assert (again.folder / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_what_is_not_computed_with_may_be_damaged(hub, place, folder, caplog):
    damage(place, "README.md", "truncated")
    disconnect(hub)
    check(*from_pretrained(REPO), folder)
    assert lines(caplog) == []


def test_info_notices_a_flipped_bit_in_weights_that_load(hub, place, folder, capsys, caplog):
    blob = (place.folder / "model.safetensors").resolve()
    good = blob.read_bytes()
    blob.write_bytes(flip(good, len(good) - 4))
    disconnect(hub)
    assert cli.main(["info", REPO]) == 2
    assert f"model.safetensors of {REPO} is damaged in the cache" in capsys.readouterr().err
    hub.faults.clear()
    hub.fail("GET", "/api/models/", times=10**6, status=503)
    assert cli.main(["info", REPO]) == 0
    assert f"sha256 {blob.name}" in capsys.readouterr().out
    assert blob.read_bytes() == good


# --- the page's models ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["truncated", "flipped at the start", "emptied", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_the_page_fetches_again_what_was_damaged_after_it_was_found(hub, place, folder, caplog, name, how):
    models = ModelStore(REPO)
    found = models.find()
    damage(found, name, how)
    loaded = models.load(found)
    check(loaded.model, loaded.tokenizer, folder)
    assert lines(caplog) == [f"{name} of {REPO} {LINE}"]


@pytest.mark.parametrize("when", ["before it is found", "after"])
@pytest.mark.parametrize("name", FILES)
def test_visitors_are_told_no_path(hub, place, folder, name, when):
    models = ModelStore(REPO)
    found = models.find() if when == "after" else None
    damage(place, name, "truncated")
    disconnect(hub)
    with pytest.raises(HubError) as error:
        models.load(found or models.find())
    sentence = user_message(error.value, models)
    assert sentence == f"{name} of {REPO} is damaged here and could not be fetched again; try again later"
    hub.faults.clear()
    loaded = models.load(models.find())  # at once: the minute in which the Hub is not asked again does not count
    check(loaded.model, loaded.tokenizer, folder)


def test_a_private_model_is_fetched_again_with_its_visitors_token(hub, folder, cache, monkeypatch):
    hub.add_user("alice", "hf_alice")
    hub.add_repo("alice/diary", {path.name: path.read_bytes() for path in folder.iterdir()}, private=True)
    models = ModelStore(str(folder), on_space=True)
    mine = models.find("alice/diary", token="hf_alice")
    damage(mine, "model.safetensors", "truncated")
    with pytest.raises(HubError, match="is damaged here") as error:
        models.load(mine)
    assert os.sep not in str(error.value).replace("alice/diary", "")
    loaded = models.load(models.find("alice/diary", token="hf_alice"))
    check(loaded.model, loaded.tokenizer, folder)
