"""Example of a method: distillation of the relations of regions, a new loss on the R-CNN host, all in this directory."""

from ovdet2.config.method import Method
from ovdet2.errors import UsageError


class Example(Method):
    """The angles between regions must be those between their teacher embeddings (after Tung and Mori, ICCV 2019, Eq. 4)."""

    name = "example"
    hosts = ("OpenVocabularyRCNN",)

    def add_keys(self, cfg):
        # Weight of the loss, 0: off; folder of a region cache of DATASETS.TRAIN.
        cfg.MODEL.EXAMPLE = type(cfg)({"WEIGHT": 0.0, "REGION_CACHE": ""})

    def is_on(self, cfg):
        return cfg.MODEL.EXAMPLE.WEIGHT > 0

    def check(self, cfg):
        if cfg.MODEL.EXAMPLE.WEIGHT < 0:
            raise UsageError(f"MODEL.EXAMPLE.WEIGHT is {cfg.MODEL.EXAMPLE.WEIGHT}: it must not be negative.")

    def steps(self, cfg, source, is_train):
        if not (is_train and self.is_on(cfg) and source.kind == "boxes"):
            return []
        from ovdet2.caches.training_cache import open_training_cache
        from ovdet2.data.steps.regions import AttachCachedRegions
        from projects.Example.example.relations import RelatedRegions

        # For messages: the keys, and how to build the cache.
        keys = "MODEL.EXAMPLE.REGION_CACHE", "MODEL.EXAMPLE.WEIGHT"
        build = "--config-file FILE MODEL.WEIGHTS DETECTOR, of a detector trained on base boxes"
        cache = open_training_cache(cfg.MODEL.EXAMPLE.REGION_CACHE, source.datasets, cfg, *keys, build)
        return [AttachCachedRegions(cache, kind=RelatedRegions)]

    def build(self, cfg, host):
        from projects.Example.example.relations import Relations

        return Relations({"loss_relations": cfg.MODEL.EXAMPLE.WEIGHT}) if self.is_on(cfg) else None


METHOD = Example()
