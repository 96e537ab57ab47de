import random
import time


def test_the_longest_part(exercise):
    found = exercise.longest_match("my cat eats cheese", "a dog eats cheese and a cat sleeps")
    exercise.expect(found == " eats cheese", f'" eats cheese" stands in both, and nothing longer does; not {found!r}')


def test_a_match_may_end_with_the_text(exercise):
    found = exercise.longest_match("xabc", "abcd")
    exercise.expect(found == "abc", f"abc, at the end of xabc, stands in abcd; you return {found!r}")


def test_nothing_in_common(exercise):
    found = exercise.longest_match("xyz", "abc")
    exercise.expect(found == "", f"xyz and abc have nothing in common, so the answer is '', not {found!r}")


def test_of_equally_long_ones_the_first(exercise):
    found = exercise.longest_match("abXcd", "cd ab")
    exercise.expect(found == "ab", f"ab and cd are equally long, and ab is first in the text; you return {found!r}")


def test_it_is_fast_enough(exercise):
    rng = random.Random(0)
    corpus = "".join(rng.choices("abcdefgh ", k=100_000))
    began = time.process_time()
    found = exercise.longest_match(corpus[5000:5150] + "!" + corpus[70_000:70_149], corpus)
    took = time.process_time() - began
    exercise.expect(found == corpus[5000:5150], "150 characters were copied from the corpus, and you do not find them")
    exercise.expect(took < 5, f"that took {took:.0f} s; do you try each start with each end? Never move the end back.")
