"""Procedurally drawn scenes: an offline benchmark for long captions, with the truth about every sentence.

Each image shows four to six drawn objects on a loose grid. Its long caption has one sentence about the whole and one per
object; short captions use the same sentences, one at a time. In `val` and `test` every scene has a twin that differs in
one attribute of one object, so that detail decides. Look at it: `python -m fast_goal.data.sources.scenes PATH`.

`rich_scenes` are the same with four to eight objects and more of every kind, for a stronger base (docs/scenes_large.md).

The images of `val` and `test` also come with true and false captions to choose between, with objects to be named, and with
masks: the object that each pixel shows.

`vocabulary` words and records, `shapes` and `more_shapes` silhouettes, `drawing` pixels and boxes, `layout` random scenes
and twins, `language` sentences, `choices` false captions beside true ones, `labels` objects to be named, `masks` their
pixels, `samples` one finished sample, `source` the whole data set; `truth` reads captions back and says which are false.
"""

from fast_goal.data.sources.scenes.source import ScenesConfig, load

__all__ = ["ScenesConfig", "load"]
