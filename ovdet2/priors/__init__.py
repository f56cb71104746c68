"""Who says which words exist in an image: one backend a file, all of them written by :mod:`ovdet2.priors.concept_prior`.

A backend has ``kind`` (one of KINDS there), ``source`` (what decides its scores, for the manifest), and
``lists(records, skip)``, which yields (image id, word index Tensor [n] or None for all words, score Tensor [n] in
[0, 1]) for Detectron2 records in any order. ``skip(message)`` is called for an image that cannot be used; it gets no
list.
"""
