# pyright: reportMissingImports=false
"""A batch on vLLM: one engine with the gate of the plug-in, the rows of many videos in flight at once.

Rows are answered in any order. Where the engine dies it is started again, and what was in flight is asked again; the
results file is the checkpoint, as with the other engines.
"""

import asyncio
import os
import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ...integrations.errors import InputError
from ...integrations.transformers.backbones import visual_token_ids
from ...integrations.vllm.plugin import ENDS_WITH_PARENT
from ..checkpoint import first_line, read_config, read_processor
from ..video.names import each, sha256s_of
from .job import Groups
from .results import Record
from .rows import BatchRow
from .worker import BatchJob, about, failed

if TYPE_CHECKING:
    from ..video.reader import VideoClip

MAX_DEATHS = 3
VIDEOS_IN_FLIGHT = 32  # whose frames are held in memory
_NOT_IN_VLLM = {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "num_beams": 1}
_NOT_IN_VLLM |= {"min_length": 0, "min_new_tokens": None, "begin_suppress_tokens": None, "sequence_bias": None}
_NOT_IN_VLLM |= {"forced_bos_token_id": None, "forced_eos_token_id": None, "guidance_scale": None}
"""What generation_config.json may ask for of greedy decoding, with the values that ask for nothing."""


def vllm_engine(job: BatchJob, groups: Groups, *, options: dict[str, Any]) -> Iterator[Record]:
    """Answers rows by an engine in a process of its own.

    Args:
        options: vLLM's engine arguments beyond those that the job gives.

    Raises:
        InputError: vLLM or its plug-in is not there, an option is the job's own, or the engine cannot start.
        ChildProcessError: the engine has died `MAX_DEATHS` times.
    """
    answers = _Answers(job, groups, options)
    try:
        while True:
            item = answers.queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        answers.stop()


class _Answers:
    """A thread with an event loop that fills `queue`: results, an exception, and None at the end."""

    def __init__(self, job: BatchJob, groups: Groups, options: dict[str, Any]) -> None:
        self._job, self._settings_hash = job, job.settings_hash()
        self._waiting = [list(rows) for rows in groups]
        self._arguments = _arguments(job, options)
        self._processor = read_processor(job.model)
        of_videos = self._processor.tokenizer.convert_tokens_to_ids(getattr(self._processor, "video_token", "<video>"))
        self._visual = {*visual_token_ids(read_config(job.model)).values(), of_videos}
        self._sampling = _sampling(job, self._processor)
        self.queue: queue.Queue[Record | BaseException | None] = queue.Queue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="vllm-batch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the engine and the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
        self._thread.join(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._answer_all())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.queue.put(error)
        self.queue.put(None)

    async def _answer_all(self) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        for _ in range(MAX_DEATHS):
            engine = self._start()
            try:
                self._videos = asyncio.Semaphore(VIDEOS_IN_FLIGHT)
                async with asyncio.TaskGroup() as tasks:
                    for rows in self._waiting:
                        tasks.create_task(self._answer(engine, rows))
                return
            except* EngineDeadError:
                self._waiting = [rows for rows in self._waiting if rows]
            finally:
                engine.shutdown()
        raise ChildProcessError(f"vLLM's engine has died {MAX_DEATHS} times: see its log above")

    def _start(self) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**self._arguments))
        except (TypeError, ValueError, RuntimeError, OSError) as error:
            said = [line.strip() for line in str(error).splitlines() if "videoanchor: " in line]
            raise InputError(f"vLLM cannot start: {said[0] if said else first_line(error)}") from error

    async def _answer(self, engine: Any, rows: list[BatchRow]) -> None:
        """The rows of one video; each leaves `rows` with its result."""
        async with self._videos:
            start = time.perf_counter()
            try:
                clip = await asyncio.to_thread(self._read, rows[0])
            except Exception as error:
                for row in list(rows):
                    self._finish(rows, row, failed(row, self._settings_hash, error))
                return
            decoded = time.perf_counter() - start
            async with asyncio.TaskGroup() as tasks:
                for n, row in enumerate(list(rows)):
                    tasks.create_task(self._ask(engine, rows, row, clip, 0.0 if n else decoded))

    def _read(self, row: BatchRow) -> "VideoClip":
        from ..video.reader import read_video

        (video,) = each(row.video)
        return read_video(video, **self._job.video)

    async def _ask(self, engine: Any, rows: list[BatchRow], row: BatchRow, clip: "VideoClip", decoded: float) -> None:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            prompt = self._prompt(clip, row)
            outputs = [one async for one in engine.generate(prompt, self._sampling, row.key(self._settings_hash))]
            record = self._done(row, clip, outputs[-1], decoded)
        except EngineDeadError:
            raise
        except (ValueError, VLLMClientError) as error:  # as of a prompt that is longer than the context
            record = failed(row, self._settings_hash, InputError(first_line(error)))
        except Exception as error:
            record = failed(row, self._settings_hash, error)
        self._finish(rows, row, record)

    def _finish(self, rows: list[BatchRow], row: BatchRow, record: Record) -> None:
        rows.remove(row)
        self.queue.put(record)

    def _prompt(self, clip: "VideoClip", row: BatchRow) -> dict[str, Any]:
        from ..prompt import chat_text, place, video_metadata

        _, messages = place(clip, row.messages())
        text = chat_text(self._processor, messages)
        about_video = asdict(video_metadata(clip)) | {"do_sample_frames": False}
        return {"prompt": text, "multi_modal_data": {"video": [(clip.frames, about_video)]}}

    def _done(self, row: BatchRow, clip: "VideoClip", output: Any, decoded: float) -> Record:
        tokens, times = list(output.outputs[0].token_ids), output.metrics
        prefill, decode = times.first_token_ts - times.scheduled_ts, times.last_token_ts - times.first_token_ts
        return {
            **about(row, self._settings_hash),
            "status": "done",
            "sha256": sha256s_of(row.video),
            "answer": self._processor.batch_decode([tokens], skip_special_tokens=True)[0].strip(),
            "failure": None,
            "reason": None,
            "tokens": {
                "prompt": len(output.prompt_token_ids),
                "visual": sum(token in self._visual for token in output.prompt_token_ids),
                "generated": len(tokens),
            },
            "frames": len(clip.frames),
            "notes": list(clip.notes),
            "ssc": None,
            "seconds": {
                **{"decode_video": decoded, "vision": None, "ssc": None, "prefill": prefill, "decode": decode},
                **{"decode_per_token": decode / max(len(tokens) - 1, 1), "generate": prefill + decode},
            },
            "peak_memory_bytes": None,
            "peak_host_memory_bytes": None,
            "device": "vllm",
            "version": version("videoanchor-triton"),
        }


def _arguments(job: BatchJob, options: dict[str, Any]) -> dict[str, Any]:
    """Of `AsyncEngineArgs`."""
    ours = {
        "model": job.model,
        "tensor_parallel_size": job.tensor_parallel,
        "dtype": job.dtype,
        "attention_backend": "CUSTOM",
        "additional_config": {"videoanchor": job.config.to_dict()},
        "disable_log_stats": False,  # times of requests
    }
    if twice := sorted(ours.keys() & options.keys()):
        raise InputError(f"--engine-options: {', '.join(twice)}: given by the command's own options")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ[ENDS_WITH_PARENT] = "1"
    try:
        from vllm.plugins import load_general_plugins
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
    except ImportError as error:
        raise InputError(f"vLLM cannot be imported: {first_line(error)}") from error
    load_general_plugins()
    try:
        gated = "videoanchor_triton" in AttentionBackendEnum.CUSTOM.get_path()
    except ValueError:
        gated = False
    if not gated:
        raise InputError("vLLM has not loaded the plug-in videoanchor: name it in VLLM_PLUGINS, or unset that variable")
    defaults = {"limit_mm_per_prompt": {"video": 1, "image": 0}, "enable_log_requests": False}
    return defaults | options | ours


def _sampling(job: BatchJob, processor: Any) -> Any:
    """Greedy, with what transformers' `generate()` takes from the checkpoint's generation_config.json for it."""
    from transformers import GenerationConfig
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": job.max_new_tokens}
    options |= {"output_kind": RequestOutputKind.FINAL_ONLY, "detokenize": False}  # as the other engines decode
    try:
        asked = GenerationConfig.from_pretrained(job.model)
    except OSError:  # there is none
        return SamplingParams(**options)
    unknown = [name for name, default in _NOT_IN_VLLM.items() if getattr(asked, name, None) not in (None, default)]
    if unknown:
        raise InputError(
            f"generation_config.json of {job.model} sets {', '.join(unknown)}, which vLLM does not do: use --engine "
            "local"
        )
    if asked.repetition_penalty not in (None, 1.0):
        options["repetition_penalty"] = asked.repetition_penalty
    if asked.suppress_tokens:
        suppressed = set(asked.suppress_tokens)
        options["allowed_token_ids"] = [token for token in range(len(processor.tokenizer)) if token not in suppressed]
    return SamplingParams(**options)
