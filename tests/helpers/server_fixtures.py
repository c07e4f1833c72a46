"""Fixtures: a server with the fake engine, and clients for it: OpenAI's, and plain HTTP."""

import httpx
import pytest
from fake_engine import new_client, serving

from llama_jax.tokenizer.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared_data):
    return load_tokenizer(shared_data / "stories260K" / "hf")


@pytest.fixture(scope="module")
def served(tokenizer):
    with serving(tokenizer) as (engine, url):
        yield engine, url


@pytest.fixture
def engine(served):
    engine = served[0]
    engine.wait_until_idle()
    engine.requests.clear()
    engine.reasons.clear()
    return engine


@pytest.fixture
def client(served, engine):
    with new_client(served[1]) as client:
        yield client


@pytest.fixture
def http(served, engine):
    with httpx.Client(base_url=served[1]) as http:
        yield http
