# pyright: reportMissingImports=false
"""vLLM's OpenAI server with the plug-in, asked by OpenAI's client."""

import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from openai import APIStatusError, OpenAI
from PIL import Image
from vllm_media import END, GATED, IMAGE, QWEN, START, VIDEO
from vllm_reference import Reference
from vllm_runs import LOGPROBS, environment

pytestmark = pytest.mark.timeout(600)
NAMES = ("image", "video A", "text", "video B", "videos A and C", "video A, other question")


class Server:
    def __init__(self, checkpoint: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = folder / "server.log"
        command = [
            # `vllm serve` asks for a distribution named "vllm", which the CPU build is not
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", "tiny", "--enforce-eager"),
            *("--max-model-len", "1024", "--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)),
            *("--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--block-size", "32", "--skip-mm-profiling"),
            *("--limit-mm-per-prompt", '{"video": 2, "image": 2}', "--generation-config", "vllm"),
            *("--media-io-kwargs", '{"video": {"fps": 2.0}}', "--attention-backend", "CUSTOM"),
            *("--additional-config", json.dumps({"videoanchor": GATED})),
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment())
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=120)

    def wait(self) -> None:
        end = time.monotonic() + 300
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
                return answer.status == 200
        except OSError:
            return False

    def ask(self, name: str, **options: Any) -> Any:
        given = {"temperature": 0, "max_tokens": 12, "extra_body": {"return_token_ids": True, "ignore_eos": True}}
        return self.client.chat.completions.create(model="tiny", messages=[message(name)], **{**given, **options})


def _encoded(image: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def message(name: str) -> Any:
    """The request as the demo's chat template turns it into the same prompt; frames of a video without losses."""
    request, content = QWEN[name], []
    rest, videos, images = (
        request.prompt.removeprefix(START).removesuffix(END),
        iter(request.videos),
        iter(request.images),
    )
    while rest:
        if rest.startswith(VIDEO):
            frames = ",".join(_encoded(frame) for frame in next(videos))
            content.append({"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{frames}"}})
            rest = rest.removeprefix(VIDEO)
        elif rest.startswith(IMAGE):
            content.append(
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_encoded(next(images))}"}}
            )
            rest = rest.removeprefix(IMAGE)
        else:
            text, mark, more = rest.partition("<|vision_start|>")
            content.append({"type": "text", "text": text})
            rest = mark + more
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def server(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(qwen, tmp_path_factory.mktemp("server"))
    try:
        one.wait()
        yield one
    finally:
        one.process.send_signal(signal.SIGINT)
        one.process.wait(60)


@pytest.fixture(scope="module")
def reference(qwen: Path) -> Reference:
    return Reference(qwen)


def assert_right(answer: Any, reference: Reference, name: str) -> None:
    choice = answer.choices[0]
    tokens = choice.model_dump()["token_ids"]
    expected = reference.answer(QWEN[name], answer.model_dump()["prompt_token_ids"], 12, "dense")
    assert tokens == expected.tokens, name
    if choice.logprobs is not None:
        found = [one.logprob for one in choice.logprobs.content]
        assert max(abs(a - b) for a, b in zip(found, expected.logprobs, strict=True)) < LOGPROBS, name


@pytest.mark.parametrize("name", NAMES)
def test_answers(server: Server, reference: Reference, name: str) -> None:
    assert_right(server.ask(name, logprobs=True), reference, name)


def test_stream(server: Server, reference: Reference) -> None:
    streamed = [part.model_dump() for part in server.ask("video B", stream=True)]
    tokens = [token for part in streamed for choice in part["choices"] for token in choice.get("token_ids") or []]
    whole = server.ask("video B")
    assert tokens == whole.choices[0].model_dump()["token_ids"]
    assert_right(whole, reference, "video B")


def test_eight_clients_at_once(server: Server, reference: Reference) -> None:
    names = [NAMES[i % len(NAMES)] for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for name, answer in zip(names, pool.map(server.ask, names), strict=True):
            assert_right(answer, reference, name)


def test_a_client_that_goes_away(server: Server, reference: Reference) -> None:
    stream = server.ask("videos A and C", stream=True, max_tokens=600)
    next(iter(stream))
    stream.close()
    assert_right(server.ask("video A", logprobs=True), reference, "video A")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64,AAAA,BBBB"}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "no url"}},
    ],
    ids=["image", "frames", "mp4", "file", "no url"],
)
def test_malformed_media(server: Server, reference: Reference, part: Any) -> None:
    """Refused, and the engine lives."""
    with pytest.raises(APIStatusError) as error:
        server.client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
        )
    of_vllm = "Cannot load local files without" in str(error.value)  # which it answers with 500
    assert 400 <= error.value.status_code < 500 or of_vllm
    assert server.healthy()
    assert_right(server.ask("image"), reference, "image")


def test_structured_output(server: Server) -> None:
    """With a video in the prompt."""
    form = {"structured_outputs": {"choice": ["the left one", "the right one"]}}
    answer = server.ask("video A", max_tokens=40, extra_body=form)
    assert answer.choices[0].message.content in form["structured_outputs"]["choice"]


def test_the_log_says_what_scoring_cost(server: Server) -> None:
    server.ask("image")
    assert "items of" in server.log.read_text()
    assert "could not be scored" in server.log.read_text()
