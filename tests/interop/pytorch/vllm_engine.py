"""Answers requests with vLLM; `test_vllm.py` runs this file with the Python of vLLM's own environment.

    build/venv-vllm/bin/python vllm_engine.py job.json answers.json

The job is {"engine": arguments of `vllm.LLM`, "requests": [...]}. A request has one of

    "messages"  a conversation; image parts are {"type": "image", "path": file}
    "prompt"    a rendered text, with "arrays": files of numpy arrays that are passed as images
    "embeds"    a file with the vectors of a complete prompt

and may have "options", the processor's options for this request. The answers are {"text": ...} or {"error": ...}.
"""

import json
import sys

import numpy as np
import PIL.Image


def main(job_file: str, answers_file: str) -> None:
    from vllm import LLM, SamplingParams

    with open(job_file) as file:
        job = json.load(file)
    llm = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=32)
    answers = [None] * len(job["requests"])

    # Requests with the same options run as one batch, so that they share steps as on a server.
    batches = {}
    for number, request in enumerate(job["requests"]):
        batches.setdefault(_key(request, number), []).append(number)
    for numbers in batches.values():
        requests = [job["requests"][number] for number in numbers]
        try:
            if "messages" in requests[0]:
                chats = [_chat(request["messages"]) for request in requests]
                outputs = llm.chat(chats, sampling, mm_processor_kwargs=requests[0].get("options"))
            else:
                outputs = llm.generate([_prompt(request) for request in requests], sampling)
            for number, output in zip(numbers, outputs, strict=True):
                answers[number] = {"text": output.outputs[0].text}
        except Exception as error:
            for number in numbers:
                answers[number] = {"error": f"{type(error).__name__}: {error}"}
    with open(answers_file, "w") as file:
        json.dump(answers, file)


def _key(request: dict, number: int) -> tuple:
    """Returns the key of the request's batch; a request that is expected to fail is alone in its batch."""
    kind = next(kind for kind in ("messages", "prompt", "embeds") if kind in request)
    return kind, json.dumps(request.get("options")), number if request.get("fails") else None


def _chat(messages: list[dict]) -> list[dict]:
    """Returns a conversation in vLLM's form."""

    def convert(part):
        if part["type"] != "image":
            return part
        return {"type": "image_pil", "image_pil": PIL.Image.open(part["path"])}

    return [
        {**message, "content": [convert(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _prompt(request: dict) -> dict:
    """Returns a prompt in vLLM's form."""
    if "embeds" in request:
        import torch

        return {"prompt_embeds": torch.tensor(np.load(request["embeds"]))}
    arrays = [np.load(file) for file in request["arrays"]]
    return {
        "prompt": request["prompt"],
        "multi_modal_data": {"image": arrays},
        "mm_processor_kwargs": request.get("options") or {},
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
