"""What the tests share: tiny models, a few blocks of the sample story, and no network."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nbclient import NotebookClient
from notebook_runs import short_book
from transformers import GPT2Config, GPT2LMHeadModel

import willows_kd as kd
from willows_kd.models import BUNDLED_TEACHER, load_tokenizer

LOOPBACK = {"localhost", "127.0.0.1", "::1"}
LONGEST = ("test_notebooks.py", "test_colab.py", "test_browser.py")


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


class NetworkForbidden(OSError):
    """A test tried to leave the machine; an OSError, so that code sees a dead network."""


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Every connection and name look-up but those of this machine fails."""
    patch = pytest.MonkeyPatch()
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if isinstance(address, tuple) and address[0] not in LOOPBACK:
            raise NetworkForbidden(f"a test tried to reach {address}")
        return connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if host is not None and host not in LOOPBACK:
            raise NetworkForbidden(f"a test tried to look up {host}")
        return getaddrinfo(host, *args, **kwargs)

    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The user's cache and corpus are neither seen nor touched."""
    # not in `tmp_path`, where tests look for what is left: other libraries use it, too
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("WILLOWS_KD_CORPUS", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):  # a local proxy would let tests out
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled tokenizer."""
    return load_tokenizer(BUNDLED_TEACHER)


@pytest.fixture(scope="session")
def story():
    """The sample story."""
    return kd.load_corpus("sample")


@pytest.fixture(scope="session")
def blocks(story, tokenizer):
    """A few short blocks of the sample story."""
    packed = kd.pack(story, tokenizer, block_size=32)
    return kd.Blocks(packed.train[:24], packed.validation[:6], packed.test[:6], packed.remainder)


@pytest.fixture(scope="session")
def make_gpt2(tokenizer):
    """A function that makes a tiny GPT-2 with random weights and the bundled vocabulary."""

    def make(layers: int = 4, seed: int = 0, **settings) -> GPT2LMHeadModel:
        sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_head": 2, "n_positions": 64}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return GPT2LMHeadModel(GPT2Config(n_layer=layers, **(sizes | ends | settings))).eval()

    return make


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with random weights."""
    return make_gpt2()


@pytest.fixture
def model_dir(teacher, tokenizer, tmp_path):
    """A tiny teacher with its tokenizer, as a directory."""
    folder = tmp_path / "teacher"
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """A function that runs a notebook in an empty folder, on the short book, without a network."""
    monkeypatch.setenv("WILLOWS_KD_CORPUS", str(short_book(tmp_path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here = {"metadata": {"path": str(tmp_path)}}

    def run(notebook, kernel_name="python3", **settings):
        settings |= {"kernel_name": kernel_name, "resources": here}
        NotebookClient(notebook, timeout=900, **settings).execute()
        return notebook

    return run


def shake(model, seed: int = 1):
    """Noise on every weight, so that no bias is 0, no norm 1 and no two layers are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def padded_head(model, more: int = 300):
    """A copy with more embeddings and a head of more rows, which mean nothing."""
    padded = copy.deepcopy(model)
    padded.resize_token_embeddings(model.config.vocab_size + more, mean_resizing=False)
    return padded


@pytest.fixture
def ids():
    """Some token ids."""
    return torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model, ids):
    with torch.inference_mode():
        return model.eval()(ids).logits


def python(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    """Run Python in a new process, with one thread; what it says is kept."""
    command = [sys.executable, *map(str, arguments)]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=alone, timeout=600)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="session")
def swap_words():
    """A function that gives two words of a saved tokenizer each other's ids."""

    def swap(folder: Path) -> Path:
        file = folder / "tokenizer.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[300:302]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        file.write_text(json.dumps(content), encoding="utf-8")
        return folder

    return swap
