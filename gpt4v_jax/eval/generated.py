"""What the model writes, against what people wrote: word error rate of speech, BLEU and chrF of translations.

The scores are those of jiwer and sacrebleu; intervals are of the questions drawn with replacement.
"""

import sys

import numpy as np

from gpt4v_jax.data import chat, packing, sources
from gpt4v_jax.eval import common
from gpt4v_jax.generate import decode
from gpt4v_jax.model.gpt4v import GPT4V
from gpt4v_jax.training.workdir import Trained

LONGER = 2  # an answer may be so many times as long as the longest true one


def answers(subject: common.Subject) -> tuple[list[str], list[str]]:
    """-> (what greedy decoding writes to each question, the true answers), without white space at their ends."""
    model = GPT4V(subject.run.model, subject.layout, subject.run.compute)
    trained = Trained(subject.run, subject.layout, subject.tokenizer, subject.mesh, model, subject.params, 0)
    asked = sources.Questions(subject.source)
    unanswered = [asked.pieces(0, i, answered=False) for i in range(len(asked.items))]
    prompts = [chat.document(pieces, asked.special, subject.layout) for pieces in unanswered]
    fits = packing.fits(np.array([chat.needs(pieces, subject.layout) for pieces in unanswered]), subject.layout)
    longest = LONGER * max(len(turn.answer_ids) for _, turn in asked.items) + 1
    # Neighbours in length share a batch: less padding, and few shapes.
    order, rows = np.argsort([len(p) + len(p.source) for p in prompts], kind="stable"), subject.run.eval.batch
    order = [i for i in order if fits[i] and len(prompts[i]) < subject.layout.context]
    written = dict.fromkeys(range(len(prompts)), "")
    if len(order) < len(prompts):
        lost = f"{len(prompts) - len(order):,} of {len(prompts):,} questions count as wrong: no row can hold them"
        print(lost, file=sys.stderr, flush=True)
    for first in range(0, len(order), rows):
        subject.check()
        part = order[first : first + rows]
        padded = [prompts[i] for i in part] + [prompts[part[-1]]] * (rows - len(part))
        found = decode.generate(trained, padded, asked.read, longest)
        written |= {int(i): answer.text.strip() for i, answer in zip(part, found, strict=False)}
    return [written[i] for i in range(len(prompts))], [turn.answer.strip() for _, turn in asked.items]


def wer(subject: common.Subject) -> common.Result:
    """Errors (substitutions, deletions, insertions) a word of the truth, and the share of answers without any."""
    import jiwer

    said, truth = answers(subject)
    counts = [jiwer.process_words(t, s) for s, t in zip(said, truth, strict=True)]
    errors = np.array([c.substitutions + c.deletions + c.insertions for c in counts])
    words = np.array([c.hits + c.substitutions + c.deletions for c in counts])
    low, high = common.bootstrap(lambda at: errors[at].sum() / words[at].sum(), len(said))
    right = np.array([s == t for s, t in zip(said, truth, strict=True)])
    metrics = {"wer": errors.sum() / words.sum(), "wer/low": low, "wer/high": high, "accuracy": right.mean()}
    return common.Result(metrics, {"answers": (int(right.sum()), len(right))}, tuple(map(bool, right)))


def bleu(subject: common.Subject) -> common.Result:
    """Corpus BLEU (Papineni et al. 2002) and chrF (Popovic 2015), 0 to 100, as sacrebleu computes them by default (13a
    tokens, case kept)."""
    import sacrebleu

    said, truth = answers(subject)
    found = sacrebleu.corpus_bleu(said, [truth])
    metric = sacrebleu.metrics.BLEU(effective_order=True)  # else it warns at each sentence; the counts are the same
    # A sentence's counts, so that a draw of sentences needs no counting again.
    counts = np.array([_counts(metric.sentence_score(s, [t])) for s, t in zip(said, truth, strict=True)])
    low, high = common.bootstrap(lambda at: _bleu(counts[at].sum(0)), len(said))
    chrf = sacrebleu.metrics.CHRF()
    # No public name gives a sentence's counts; sacrebleu's own bootstrap fails where some draw scores 0 (2.6.0).
    parts = np.array(chrf._extract_corpus_statistics(said, [truth]))
    part_low, part_high = common.bootstrap(
        lambda at: chrf._compute_score_from_stats(parts[at].sum(0).tolist()).score, len(said)
    )
    right = np.array([s == t for s, t in zip(said, truth, strict=True)])
    metrics = {"bleu": found.score, "bleu/low": low, "bleu/high": high, "chrf/low": part_low, "chrf/high": part_high,
               "chrf": chrf.corpus_score(said, [truth]).score, "accuracy": right.mean()}  # fmt: skip
    return common.Result(metrics, {"answers": (int(right.sum()), len(right))}, tuple(map(bool, right)))


def _counts(score) -> list[int]:
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _bleu(counts: np.ndarray) -> float:
    """As corpus_bleu, which smooths where no four words in a row are right."""
    from sacrebleu.metrics import BLEU

    hits, totals, (said, true) = counts[:4].tolist(), counts[4:8].tolist(), counts[8:].tolist()
    return BLEU.compute_bleu(hits, totals, said, true, smooth_method="exp").score
