"""Concept priors: which words are present in an image. One backend per file, one format: ``priors.concept_prior``.

A backend has ``kind`` (one of :data:`ovdet2.priors.concept_prior.KINDS`), ``source`` (dict of the inputs that determine
its scores, for the manifest), and ``lists(records, skip)``. ``lists`` yields (image id, word index Tensor [n] or None
for all words, score Tensor [n] in [0, 1]) for Detectron2 records in any order. It calls ``skip(message)`` for an image
that cannot be used and yields nothing for it.
"""
