"""Does to an exported folder what TRL, PEFT, accelerate and the pipelines of transformers do. Run by test_neighbors.py.

    python neighbors.py FOLDER CHECK...

It runs in an environment without this package and prints a line per check.
"""

import contextlib
import copy
import pathlib
import sys
import tempfile

import PIL.Image
import PIL.ImageDraw
import torch

# Registries have torchvision only for GPUs. Next to a torch for CPUs it lacks its compiled operators and cannot be
# imported, unless two of them are declared. Images do not need them.
with contextlib.suppress(ImportError):
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]

import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

FOLDER = sys.argv[1]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def page(text: str) -> PIL.Image.Image:
    """Returns a page with a text."""
    image = PIL.Image.new("RGB", (120, 80), "white")
    PIL.ImageDraw.Draw(image).text((10, 30), text, fill="black")
    return image


def load(folder=FOLDER, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def question(text="A1234") -> list[dict]:
    parts = [{"type": "image", "image": page(text)}, {"type": "text", "text": "Which number?"}]
    return [{"role": "user", "content": parts}]


processor = AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)


def encode(*conversations, **kwargs):
    return processor.apply_chat_template(
        list(conversations), tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def labelled(*texts: str):
    """Returns a batch whose labels are all tokens but padding, as TRL's collator makes them."""
    answers = [[*question(text), {"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in texts]
    batch = encode(*answers)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


inputs = encode(question(), add_generation_prompt=True)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(**inputs).logits.float()


def generation():
    """Candidates, caches, beams and embeddings as inputs give the same answers as plain decoding."""
    model = load()
    expected = model.generate(**inputs, **GREEDY)
    small = copy.deepcopy(model.config)
    small.text_config.hidden_size, small.text_config.num_hidden_layers = 64, 1
    draft = type(model)(small).eval()
    draft.generation_config = model.generation_config
    text_only = transformers.LlamaForCausalLM(model.config.text_config).eval()
    text_only.generation_config = model.generation_config
    ways = [{"prompt_lookup_num_tokens": 5}, {"cache_implementation": "static"}, {"use_cache": False}]
    ways += [{"assistant_model": assistant} for assistant in (model, draft, text_only)]
    for kwargs in ways:
        assert torch.equal(model.generate(**inputs, **GREEDY, **kwargs), expected), kwargs
    both = encode(
        question(), [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], add_generation_prompt=True
    )
    alone = model.generate(**inputs, **GREEDY, num_beams=3)
    together = model.generate(**both, **GREEDY, num_beams=3)
    decoded = [processor.batch_decode(rows, skip_special_tokens=True)[0] for rows in (alone, together)]
    assert decoded[0] == decoded[1], decoded
    with torch.no_grad():
        visual = model.get_image_features(inputs["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds = model.model.place_visual_tokens(inputs["input_ids"], embeds, visual)
    answer = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **GREEDY)
    assert torch.equal(answer, expected[:, inputs["input_ids"].shape[1] :])


def compiling():
    """torch.compile gives the same logits, loss and answers; the forward pass is a single graph."""
    model, batch = load(), labelled("A1", "B2")
    expected, loss = logits(model), model(**batch).loss
    answer = model.generate(**inputs, **GREEDY)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()
    output = torch.compile(model.train(), backend="aot_eager")(**batch)
    torch.testing.assert_close(output.loss, loss, atol=1e-3, rtol=1e-3)
    output.loss.backward()
    assert output.logits.shape[:2] == batch["input_ids"].shape
    torch._dynamo.reset()
    model.eval().forward = torch.compile(model.forward, backend="aot_eager")
    for kwargs in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, **GREEDY, **kwargs), answer), kwargs


def resizing():
    """Two tokens are added, the model is saved, loaded and saved again in shards."""
    model = load()
    expected = logits(model)
    rows = expected.shape[-1]
    tokenizer = copy.deepcopy(processor.tokenizer)  # The other checks have the tokens of the folder.
    tokenizer.add_tokens(["<box>", "</box>"], special_tokens=True)
    model.resize_token_embeddings(max(len(tokenizer), rows), pad_to_multiple_of=64)
    torch.testing.assert_close(logits(model)[..., :rows], expected)
    for kwargs in ({}, {"max_shard_size": "500KB"}):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, **kwargs)
            assert torch.equal(logits(load(folder)), logits(model))


def devices():
    """Every way of loading gives the same logits, also with parts of the model on disk."""
    import accelerate

    expected = logits(load())
    peak = expected.abs().max()
    for kwargs in ({"device_map": "auto"}, {"device_map": "cpu"}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        tolerance = 0.1 if kwargs.get("dtype") == torch.bfloat16 else 1e-5
        assert (logits(load(**kwargs)) - expected).abs().max() < tolerance * peak, kwargs
    with tempfile.TemporaryDirectory() as folder:
        model = load()
        memory = {"cpu": "2MB", "disk": "1GB"}
        parts = accelerate.infer_auto_device_map(model, memory, no_split_module_classes=model._no_split_modules)
        assert set(parts.values()) == {"cpu", "disk"}, parts
        # transformers 5.0 loses tied weights on disk, those of a Llama as well.
        if not transformers.__version__.startswith("5.0."):
            model = load(device_map=parts, offload_folder=folder)
            assert (logits(model) - expected).abs().max() < 1e-5 * peak
        offloaded = accelerate.cpu_offload(load(), execution_device="cpu")
        assert (logits(offloaded) - expected).abs().max() < 1e-5 * peak


def pipelines():
    """Both pipelines for images answer the same."""
    answers = []
    for task in ("image-text-to-text", "any-to-any"):
        if task == "any-to-any" and not hasattr(transformers, "AutoModelForMultimodalLM"):
            print("transformers", transformers.__version__, "has no", task)
            continue
        pipe = transformers.pipeline(task, model=FOLDER, trust_remote_code=True)
        assert type(pipe.model).__name__ == "AlignVLMForConditionalGeneration"
        answers.append(pipe(text=question(), max_new_tokens=8, return_full_text=False)[0]["generated_text"])
        pipe(text=[question(), question("B2")], max_new_tokens=8, return_full_text=False, batch_size=2)
    assert len(set(answers)) == 1, answers


def trainer():
    """transformers' Trainer takes two steps in every mode that changes how the loss or the logits are computed."""
    modes = [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"eval_strategy": "steps", "eval_steps": 1}]
    modes += [{"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": r}} for r in (0, 1)]
    modes += [{"label_smoothing_factor": 0.1}]
    rows = [labelled(text) for text in ("A1234", "B1234", "C1234", "D1234")]

    def collate(rows):
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    for mode in modes:
        with tempfile.TemporaryDirectory() as folder:
            settings = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-4, "logging_steps": 1}
            settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False}
            arguments = transformers.TrainingArguments(output_dir=folder, **settings, **mode)
            trainer = transformers.Trainer(
                load(), arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows
            )
            trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            losses = [float(loss) for loss in losses]
            assert len(losses) == 2 and all(0 < loss < 100 for loss in losses), (mode, losses)
            evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
            assert len(evaluations) == 2 * ("eval_strategy" in mode)


def adapters():
    """PEFT trains adapters in every part, saves them, and merges them into a folder that loads."""
    from peft import LoraConfig, PeftModel, get_peft_model

    ways = [
        {},
        {"modules_to_save": ["connector"]},
        {"modules_to_save": ["embed_tokens"]},
        {"trainable_token_indices": [4, 5]},
    ]
    for way in ways:
        model = get_peft_model(load().train(), LoraConfig(r=4, target_modules="all-linear", **way))
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(2):
            model(**labelled("A1234")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
        for part in ("language_model", "connector", "vision_tower"):
            assert any(part in name for name in moved), (way, part)
        expected = logits(model.eval())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(f"{folder}/adapter")
            again = PeftModel.from_pretrained(load(), f"{folder}/adapter").eval()
            torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
            model.merge_and_unload().save_pretrained(f"{folder}/merged")
            torch.testing.assert_close(logits(load(f"{folder}/merged")), expected, atol=1e-3, rtol=1e-3)


def sft():
    """TRL's SFTTrainer takes two steps on pages, with the whole model and with adapters that are then merged."""
    import datasets
    import trl
    from peft import LoraConfig

    texts = [f"N{i:04d}" for i in range(4)]
    user = {"role": "user", "content": "Which number?"}
    rows = {
        "images": [[page(text)] for text in texts],
        "messages": [[user, {"role": "assistant", "content": text}] for text in texts],
    }
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "messages": datasets.List(message)})
    pages = datasets.Dataset.from_dict(rows, features=features)
    for lora in (None, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")):
        for bf16 in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                settings = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1}
                settings |= {"use_cpu": True, "report_to": "none", "save_strategy": "no", "max_length": None}
                config = trl.SFTConfig(output_dir=folder, bf16=bf16, **settings)
                trainer = trl.SFTTrainer(
                    load(), args=config, train_dataset=pages, processing_class=processor, peft_config=lora
                )
                trainer.train()
                losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                assert len(losses) == 2 and all(0 < float(loss) < 100 for loss in losses), losses
                if lora and not bf16:
                    merged = pathlib.Path(sys.argv[1]).parent / f"merged-trl-{trl.__version__}"
                    trainer.model.merge_and_unload().save_pretrained(merged)
                    processor.save_pretrained(merged)
                    assert logits(load(merged)).isfinite().all()


if __name__ == "__main__":
    for name in sys.argv[2:]:
        globals()[name]()
        print("ok", name, flush=True)
