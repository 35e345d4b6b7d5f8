"""What a model answers, how it goes on with a text, and what it looks at: parts of the report's page."""

import dataclasses
import html

import numpy as np

from gpt4v_jax import config, plots
from gpt4v_jax.data import chat, clip, mixture, sound, sources, transforms
from gpt4v_jax.eval import common
from gpt4v_jax.generate import decode, sample
from gpt4v_jax.generate import prompts as prompts_lib
from gpt4v_jax.interpret import attention
from gpt4v_jax.training import workdir

SHOWN, EXPLAINED = 24, 4  # questions in the grid; and with maps of attention
SAMPLE = 256  # tokens of a text, its given beginning and what the model writes
FRAMES = 6  # of a clip that are shown


def told(trained: workdir.Trained) -> tuple[str, str]:
    """-> (what the model answers, or how it goes on, of each data set; maps of attention for some pictures)."""
    told, looks, names = "", "", [entry.name for entry in mixture.entries(trained.run.data)]
    for name in names:
        run = mixture.one(trained.run, name)
        one = dataclasses.replace(trained, run=run)
        title = f"<h3>{html.escape(name)}</h3>" if len(names) > 1 else ""
        if trained.is_text(name):
            told += title + _samples(one)
        else:
            answers, maps = _answers(one, max(SHOWN // len(names), 4))
            told, looks = told + title + answers, looks + maps
    return told, looks


def _seen(media: list[tuple[str, bytes]], layout) -> list[np.ndarray]:
    """-> what can be shown of media, uint8 [H,W,3]: a picture, frames side by side, a sound's log-mel with low tones
    below."""
    shown = []
    for name, data in media:
        if name == "image":
            shown.append(transforms.decode_picture(data, layout.image.size))
        if name == "video":
            shown.append(np.concatenate(clip.decode(data, count=FRAMES)[0], axis=1))
        if name == "audio":
            mel = sound.log_mel(sound.decode(data), layout.audio.bins)
            grey = np.uint8(255 * (mel - mel.min()) / max(np.ptp(mel), 1e-6)).T[::-1]
            shown.append(np.repeat(grey[..., None], 3, axis=-1))
    return shown


def _answers(trained: workdir.Trained, count: int) -> tuple[str, str]:
    """-> (a grid of answers, maps of attention for some of them)."""
    splits = sources.splits(trained.run.data)
    split = "test" if "test" in splits else splits[-1]
    source = common.open_source(trained.run, split, trained.tokenizer, trained.layout)
    records, asked = sources.open_split(trained.run.data, split), sources.Questions(source)
    items = asked.items
    turns, seen, prompts = [], [], []
    for i in np.random.default_rng(0).permutation(len(items)):
        pieces = asked.pieces(0, int(i), answered=False)
        if len(turns) == count or np.any(np.array(chat.needs(pieces, trained.layout)) > trained.layout.room):
            continue
        r, t = asked.asked[i]
        try:
            shown = _seen(sources.media_of(records[source.records[r].number], t), trained.layout)
        except transforms.BadMedium:
            continue
        turns.append(items[i][1])
        seen.append(shown)
        prompts.append(chat.document(pieces, asked.special, trained.layout))
    if not turns:
        raise config.InputError(f"no question of the {split} split of {trained.run.data.name} can be shown")
    longest = max(16, 2 * max(len(turn.answer_ids) for turn in turns))
    answers = decode.generate(trained, prompts, asked.read, longest)
    right = [answer.text == turn.answer for answer, turn in zip(answers, turns, strict=True)]
    grid, looks, words = "", "", []
    for turn, answer, hit, pictures in zip(turns, answers, right, seen, strict=True):
        mark = f'<span class="mark">{"✓ right" if hit else "✗ wrong"}</span>'
        said = f"<b>{html.escape(answer.text) or '(nothing)'}</b> {mark}"
        truth = "" if hit else f" <span>truth: <b>{html.escape(turn.answer)}</b></span>"
        words.append(f"<span>{html.escape(turn.question)}</span> <span>{said}</span>{truth}")
        shown = "".join(plots.img(picture, turn.question) for picture in pictures)
        grid += f'<figure class="{"right" if hit else "wrong"}">{shown}{words[-1]}</figure>'
    drawn = f"{len(turns)} questions drawn at random from the {split} split (seed 0, not picked by hand)"
    drawn += f", answered by the checkpoint of step {trained.step:,}: {sum(right)} right."
    first_of_kind = {turn.kind: i for i, turn in reversed(list(enumerate(turns)))}
    explained = [i for i in sorted(first_of_kind.values()) if any(m.modality == "image" for _, m in prompts[i].media)]
    for i in explained[:EXPLAINED]:
        picture = seen[i][[m.modality for _, m in prompts[i].media].index("image")]
        maps = attention.over_picture(trained, prompts[i], asked.read, len(prompts[i]) - 1)
        if not len(maps):
            continue
        panels = f"<figure>{plots.img(picture, 'the picture')}<figcaption>the picture</figcaption></figure>"
        for name, heat in [*((f"layer {k}", m) for k, m in enumerate(maps, 1)), ("mean of layers", maps.mean(0))]:
            shares = f"{heat.sum():.0%} on the picture, {heat.max():.1%} on one patch"
            panels += f"<figure>{plots.img(plots.heat(picture, heat), name)}"
            panels += f"<figcaption><b>{name}</b><br>{shares}</figcaption></figure>"
        mark = "right" if right[i] else "wrong"
        looks += f'<div class="looks {mark}"><p>{words[i]}</p><div class="maps">{panels}</div></div>'
    return f'<p class="note">{drawn}</p><div class="pictures">{grid}</div>', looks


def _samples(trained: workdir.Trained) -> str:
    """How the model goes on with the beginnings of some windows of the held-out text."""
    split = [split for split in sources.splits(trained.run.data) if split != "train"][-1]
    source = common.open_source(trained.run, split, trained.tokenizer, trained.layout)
    count, sampling = len(source.needs(0)), sample.Sampling(temperature=0.8)
    length = min(trained.layout.context, SAMPLE)
    windows = np.random.default_rng(0).choice(count, min(4, count), replace=False)
    given = [trained.tokenizer.decode(source.document(0, int(i)).tokens[: length // 4]) for i in windows]
    prompts = [prompts_lib.prompt(trained, text) for text in given]
    answers = decode.generate(trained, prompts, None, length - length // 4, sampling)
    texts = "".join(
        f'<pre class="sample"><span class="given">{html.escape(text)}</span>{html.escape(answer.text)}</pre>'
        for text, answer in zip(given, answers, strict=True)
    )
    said = f"In grey, beginnings drawn at random from the {split} split (seed 0, not picked by hand); then what the "
    said += f"checkpoint of step {trained.step:,} writes at temperature {sampling.temperature}, up to "
    return f'<p class="note">{said}{length} tokens in all.</p><div class="charts">{texts}</div>'
