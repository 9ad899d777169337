"""Scores a dense model and variants of it in one walk up the layers they share.

``score.score_together(request)`` writes for every label what a separate run of
``lm_eval --model streamline`` writes: same answers, same files, less computed.

The words of this package:

* *step*: a decoder layer, or the network attached behind one, named by the hash of its content;
* *stack*: a model as a sequence of steps; models share the steps that their stacks begin with;
* *boundary*: a place between two steps, by the number of steps below it;
* *leg*: one model's part of a walk: the boundary where it starts, and those whose hidden states it
  keeps for models after it;
* *walk*: models that share their first steps, run on one batch after the other, each one its leg;
* *assembly*: loading these models, with equal weights in memory once;
* *journal*: a file of one model's answers, so that a killed walk can continue;
* *catalogue*: the harness's tasks, loaded once for all models.
"""
