"""A teacher behind a small local server that answers as vLLM's does, and the failures of such a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from hymba_tune.config import DistillCaptureConfig, DistillConfig
from hymba_tune.distill import server as serving
from hymba_tune.distill.capture import run_capture
from hymba_tune.distill.server import KEY_VARIABLE, ServedTeacher, find_server, request
from hymba_tune.errors import ConfigError, TrainingError
from hymba_tune.inputs import check_inputs
from tests.distill.runs import RecordingScreen, run
from tests.distill.teachers import random_model, tokenizer_size
from tests.distill.tokenizers import ALL
from tests.tolerances import FLOAT32

TOKENIZER = ALL["llama3"]
SIZE = tokenizer_size(TOKENIZER)
K = 5
SECRET = "sk-not-for-your-eyes"
ROWS = [[1, 7, 30, 200, 9], [5], [8, 8, 8], [300, 2, 17, 40, 41, 42, 43]]
Answer = Callable[[dict[str, Any]], Any]


class Server:
    """Answers with the log-probabilities of a random model, as vLLM's does unless a test sets another answer."""

    def __init__(self) -> None:
        self.model = random_model("llama", SIZE + 2)
        self.models: Any = {"data": [{"id": "llama", "max_model_len": 200}]}
        self.answer: Answer = self.prompt_logprobs
        self.failures: list[int] = []
        self.keys: list[str | None] = []
        self.requests: list[dict[str, Any]] = []
        handler = type("Handler", (_Handler,), {"server_of": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def likeliest(self, prompt: list[int], k: int) -> list[tuple[int, float, dict[int, float]]]:
        """Of each token but the first: its id, its log-probability, and those of the likeliest."""
        log_probs = self.model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        found = []
        for place, token in enumerate(prompt[1:]):
            values, ids = log_probs[place].topk(k)
            likeliest = dict(zip(ids.tolist(), values.tolist(), strict=True))
            found.append((token, float(log_probs[place, token]), likeliest))
        return found

    def prompt_logprobs(self, body: dict[str, Any]) -> Any:
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            places: list[Any] = [None]
            for token, own, likeliest in self.likeliest(prompt, body["prompt_logprobs"]):
                top = {str(other): {"logprob": value, "rank": 1} for other, value in likeliest.items()}
                places.append(top | {str(token): {"logprob": own, "rank": 9}})
            choices.append({"index": index, "text": " a", "prompt_logprobs": places})
        return {"choices": choices[::-1]}

    def echo(self, body: dict[str, Any]) -> Any:
        choices = []
        for index, prompt in enumerate(body["prompt"]):
            if not body.get("echo"):
                choices.append({"index": index, "text": " a"})
                continue
            found = self.likeliest(prompt, body["logprobs"])
            logprobs = {
                "tokens": [f"token_id:{token}" for token in prompt] + ["token_id:0"],
                "token_logprobs": [None, *(own for _, own, _ in found), -1.0],
                "top_logprobs": [None, *({f"token_id:{t}": v for t, v in top.items()} for *_, top in found), {}],
            }
            choices.append({"index": index, "logprobs": logprobs})
        return {"choices": choices}


class _Handler(BaseHTTPRequestHandler):
    server_of: Server

    def do_GET(self) -> None:
        self._say(200, self.server_of.models)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server_of.requests.append(body)
        if self.server_of.failures:
            code = self.server_of.failures.pop(0)
            self._say(code, {"error": f"no: {self.headers['Authorization']}, logprobs"}, self.server_of.address)
        else:
            self._say(200, self.server_of.answer(body))

    def _say(self, code: int, what: Any, location: str | None = None) -> None:
        self.server_of.keys.append(self.headers["Authorization"])
        content = what if isinstance(what, bytes) else json.dumps(what).encode()
        self.send_response(code)
        if location and 300 <= code < 400:
            self.send_header("Location", f"{location}/models")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(serving, "PAUSES", (0.0, 0.0))
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    running = Server()
    yield running
    running.close()


def connect(server: Server) -> ServedTeacher:
    return find_server(server.address, TOKENIZER, K)


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_top_k_is_the_models(way: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "BATCH_TOKENS", 12)
    server.answer = getattr(server, way)
    teacher = connect(server)
    assert (teacher.name, teacher.context) == (f"llama at {server.address}", 200)
    outputs = dict(teacher.load(torch.device("cpu"), torch.float32).outputs(ROWS))
    assert sorted(outputs) == [0, 1, 2, 3]
    assert len(server.requests) == {"prompt_logprobs": 3, "echo": 4}[way]  # the other way is tried once
    for index, row in enumerate(ROWS):
        log_probs = server.model(input_ids=torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        top = outputs[index].probabilities(torch.arange(len(row) - 1), 1.0)
        following = torch.tensor(row[1:], dtype=torch.int64)[:, None]
        FLOAT32.check(top.own, log_probs.gather(1, following).squeeze(1), "its own tokens")
        known = torch.zeros_like(log_probs).scatter(1, log_probs.topk(K).indices, 1).scatter(1, following, 1)
        expected = (log_probs.exp() * known)[:, :SIZE]  # the output layer's padding is no token
        FLOAT32.check(top.probs, expected, "likeliest tokens")
        assert top.cut is not None
        FLOAT32.check(top.cut, 1 - expected.sum(-1), "mass outside the top-k")


def test_a_request_has_no_more_rows_than_servers_take(server: Server) -> None:
    server.answer = server.prompt_logprobs
    outputs = connect(server).load(torch.device("cpu"), torch.float32).outputs([[5, 6]] * 70)
    assert sorted(index for index, _ in outputs) == list(range(70))
    assert [len(request["prompt"]) for request in server.requests] == [32, 32, 6]


def test_temperature_is_that_of_the_server(server: Server) -> None:
    ((_, outputs),) = connect(server).outputs([[1, 2]])
    with pytest.raises(ValueError, match=r"temperature is 2\.0; a server's probabilities are those at 1"):
        outputs.probabilities(torch.tensor([0]), 2.0)


def test_trains_on_answers_of_the_server(server: Server, small_model: Path, questions: Path, tmp_path: Path) -> None:
    """Only answers that ended; the server returns the likelihoods of their tokens."""
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    unended = []

    def answer(body: dict[str, Any]) -> Any:
        if body["max_tokens"] == 1:
            return server.prompt_logprobs(body)
        unended.append(sum(len(prompt) for prompt in body["prompt"]) % len(body["prompt"]))
        return {
            "choices": [
                {"index": index, "text": " So.\n", "finish_reason": "length" if index == unended[-1] else "stop"}
                for index, _ in enumerate(body["prompt"])
            ]
        }

    server.answer = answer
    config = DistillConfig(
        model=str(small_model),
        data=[str(questions)],
        teacher=server.address,
        teacher_tokenizer=str(tmp_path / "tokenizer"),
        teacher_cache=tmp_path / "targets",
        min_teacher_probability=0,
        min_end_probability=0,
        loss=["seq", "auto"],
        top_k=K,
        steps=2,
        max_length=64,
        out=tmp_path / "out",
    )
    finished = run(config)
    first = server.requests[0]
    assert (first["max_tokens"], first["temperature"], first["stop"]) == (256, 1.0, ["<|eot_id|>"])
    assert finished.facts()["data"]["rows"] == 24 - len(unended)
    assert json.loads((finished.path / "samples.json").read_text())[0]["reference"] == "So."
    assert finished.facts()["described"]["bias"].startswith("a server returns its top 5 tokens")
    for wrong in ([{"finish_reason": "stop"}], [{"text": "a"}, {"text": "b"}]):
        server.answer = lambda _, choices=wrong: {"choices": choices}  # type: ignore[misc]
        with pytest.raises(TrainingError, match=r"cannot be used: (it has no text|1 prompts were sent)"):
            connect(server).generate([[1]], ends=[1], max_new_tokens=2, temperature=0, seed=0, decode=unused)


def unused(_: list[int]) -> str | None:
    raise AssertionError("a server returns text; nothing is decoded")


def test_whole_vocabulary_and_hidden_states_need_a_local_teacher(server: Server) -> None:
    teacher = connect(server)
    with pytest.raises(ConfigError, match=r"behind a server, which does not return probabilities over the whole voc"):
        teacher.full_vocabulary([[1, 2]])
    with pytest.raises(ConfigError, match=r"does not return hidden states(.|\n)*--teacher with a Hub id or a folder"):
        teacher.hidden_states([[1, 2]], [torch.tensor([0])])


def test_end_that_a_server_does_not_know_is_named(server: Server) -> None:
    """And is no part of the answer, where the server writes it."""
    texts = ["So.<|begin_of_text|>", "<|begin_of_text|>", "So."]
    server.answer = lambda _: {
        "choices": [{"index": index, "text": text, "finish_reason": "stop"} for index, text in enumerate(texts)]
    }
    teacher = connect(server)
    options: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0, "seed": 0, "decode": unused}
    end, own = TOKENIZER.convert_tokens_to_ids(["<|begin_of_text|>", "<|eot_id|>"])
    assert teacher.generate([[1]] * 3, ends=[end, own], **options) == ["So.", None, "So."]
    assert server.requests[-1]["stop_token_ids"] == [end, own]
    assert server.requests[-1]["stop"] == ["<|begin_of_text|>", "<|eot_id|>"]
    teacher.generate([[1]] * 3, ends=[own], **options)
    assert "stop_token_ids" not in server.requests[-1]


def test_capture_shows_the_bias(server: Server, questions: Path, tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    config = settings(server, questions, tmp_path)
    screen = RecordingScreen()
    targets = run_capture(config, screen)
    assert len(targets) == 24
    assert screen.lines["bias"].startswith("a server returns its top 5 tokens: the remaining mass counts as any token")
    top = targets[0].top
    assert float((top.log_probs.exp().sum(-1) + top.rest_mass.exp() - 1).abs().max()) < 0.01
    assert len(run_capture(config, RecordingScreen())) == 24


def settings(server: Server, questions: Path, folder: Path, **changes: Any) -> DistillCaptureConfig:
    usual: dict[str, Any] = {
        "model": "hymba-nano",
        "data": [str(questions)],
        "teacher": server.address,
        "teacher_tokenizer": str(folder / "tokenizer"),
        "teacher_cache": folder / "targets",
        "top_k": K,
        "min_teacher_probability": 0.0,
        "min_end_probability": 0,
    }
    return DistillCaptureConfig(**usual | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 2.0}, r"--temperature 2: a server returns probabilities at temperature 1 only"),
        ({"teacher_quantize": "nf4"}, r"--teacher-quantize: a server has loaded its model already"),
        ({"teacher_tokenizer": None}, r"--teacher-tokenizer is missing"),
        ({"teacher_tokenizer": "llama-3.2-3bb"}, r"--teacher-tokenizer llama-3\.2-3bb: no such folder"),
    ],
)
def test_what_a_server_cannot_do(
    changes: dict[str, Any], message: str, server: Server, questions: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_inputs(settings(server, questions, tmp_path, **changes))


def test_one_of_several_models_is_named(server: Server) -> None:
    server.models = {"data": [{"id": "llama"}, {"id": "other"}]}
    with pytest.raises(ConfigError, match=r"the server has llama, other\.(.|\n)*#llama"):
        connect(server)
    teacher = find_server(f"{server.address}/#other", TOKENIZER, K)
    assert teacher.name == f"other at {server.address}"
    assert teacher.fingerprint != find_server(f"{server.address}#llama", TOKENIZER, K).fingerprint
    with pytest.raises(ConfigError, match=r"expected   one of its models"):
        find_server(f"{server.address}#third", TOKENIZER, K)


@pytest.mark.parametrize("models", [{}, [], {"data": "llama"}, {"data": [1]}, b"<html>"])
def test_server_that_is_something_else(models: Any, server: Server) -> None:
    server.models = models
    with pytest.raises(TrainingError, match=r"answer cannot be used: it (lists no models|is not JSON)"):
        connect(server)


def ask(server: Server) -> None:
    list(connect(server).outputs([[1, 2, 3]]))


def logprobs(*places: Any) -> Answer:
    return lambda _: {"choices": [{"index": 0, "prompt_logprobs": [None, *places]}]}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: {"choices": []}, "1 prompts were sent, and the number of choices is another"),
        (lambda _: {"choices": [{"index": 0}]}, "neither has prompt_logprobs nor echoes tokens as their ids"),
        (
            lambda _: {"choices": [{"logprobs": {"tokens": ["a", " b", "c"], "top_logprobs": [None, {" b": -1}, {}]}}]},
            "neither has prompt_logprobs nor echoes tokens as their ids",
        ),
        (logprobs({"2": -1.0}, {"3": -1.0}), "prompt_logprobs have another form"),
        (logprobs({"2": {"logprob": -1.0}}), "about other tokens than were sent"),
        (logprobs({"2": {"logprob": -1.0}}, {"4": {"logprob": -1.0}}), "about other tokens than were sent"),
        (logprobs({"2": {"logprob": 0.5}}, {"3": {"logprob": -1.0}}), "log-probabilities above 0"),
        (logprobs({"2": {"logprob": float("nan")}}, {"3": {"logprob": -1.0}}), "log-probabilities above 0"),
        (
            logprobs({"2": {"logprob": -0.1}, "5": {"logprob": -0.1}}, {"3": {"logprob": -1.0}}),
            "sum to more than 1",
        ),
        (lambda _: b"{", "it is not JSON"),
        (lambda _: [1], "it is not JSON"),
    ],
)
def test_invalid_answers_raise(answer: Answer, message: str, server: Server) -> None:
    server.answer = answer
    with pytest.raises(TrainingError, match=rf"The server's answer cannot be used: .*{message}"):
        ask(server)


@pytest.mark.parametrize("codes", [[503], [429, 500]])
def test_busy_server_is_retried(codes: list[int], server: Server) -> None:
    server.failures = [*codes]
    ask(server)
    assert len(server.requests) == len(codes) + 1


def test_server_that_stays_busy(server: Server) -> None:
    server.failures = [503] * 9
    with pytest.raises(TrainingError, match="answers 503"):
        ask(server)
    assert len(server.requests) == 3


def test_too_many_log_probabilities(server: Server) -> None:
    server.failures = [400]
    with pytest.raises(TrainingError, match=r"answers 400: (.|\n)*higher --max-logprobs, or a lower --top-k"):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("code", [401, 403])
def test_key_that_is_wanted_or_wrong_is_never_shown(code: int, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.failures = [code]
    with pytest.raises(TrainingError, match=rf"wants a key \({code}\)(.|\n)*{KEY_VARIABLE}"):
        ask(server)
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server.failures = [code]
    with pytest.raises(TrainingError, match="refuses the key") as refused:
        ask(server)
    assert server.keys[-1] == f"Bearer {SECRET}"
    server.failures = [418]
    with pytest.raises(TrainingError, match=r"answers 418: .*Bearer …") as echoed:
        ask(server)
    for error in (refused.value, echoed.value):
        assert SECRET not in str(error)
        assert error.__cause__ is None
    assert SECRET not in repr(connect(server))


def test_key_does_not_follow_to_another_address(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, SECRET)
    server.failures = [307]
    with pytest.raises(TrainingError, match="answers 307"):
        ask(server)


def test_no_server(server: Server) -> None:
    server.close()
    with pytest.raises(TrainingError, match=r"does not answer: .*refused(.|\n)*captured targets are kept"):
        request(f"{server.address}/models")


def test_server_that_is_too_slow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "TIMEOUT", 0.05)
    monkeypatch.setattr(serving, "PAUSES", ())
    waiting = threading.Event()
    server.answer = lambda _: waiting.wait(5) and {}
    with pytest.raises(TrainingError, match="does not answer: timed out"):
        request(f"{server.address}/completions", {})
    waiting.set()
