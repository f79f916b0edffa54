"""What is asked: the same prompts and seeds everywhere, in slices that change with them."""

import pytest

from qvgen_jax.data.moving_shapes import caption, held_out_prompts
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.asked import held_out, in_slices, parse_part, questions, seed_of


def config(prompts: str, videos: int) -> dict:
    return {"sample": {"prompts": prompts}, "evaluate": {"videos": videos, "seed": 7}}


def test_held_out_prompts_are_cycled_and_their_seeds_count_up_as_in_the_published_figures():
    asked = questions(config("held_out", 400))
    every = held_out_prompts()
    assert [each.seed for each in asked] == list(range(7, 407))
    assert asked[len(every)].wanted == every[0]
    assert asked[3].prompt == caption(every[3])


def test_a_line_that_is_added_to_a_file_changes_no_other_prompt_s_videos(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\ntwo\n")
    before = questions(config(str(path), 4))
    assert [each.prompt for each in before] == ["one", "two", "one", "two"]
    assert len({each.seed for each in before}) == 4
    assert before[2].seed == seed_of("one", 1, 7)
    path.write_text("new\none\ntwo\n")
    assert set(before) < set(questions(config(str(path), 6)))


def test_the_seed_of_a_prompt_is_a_fixed_number():
    assert seed_of("alley", 0) == 1333051663  # By hand: sha256 of "0 0 alley", 31 bits.


def test_slices_are_named_by_what_they_ask_and_more_videos_keep_the_full_ones():
    few, many = (in_slices(held_out(count, 0), 4) for count in (6, 9))
    assert [len(part) for part in many.values()] == [4, 4, 1]
    assert set(few) & set(many) == {next(iter(few))}
    assert not set(many) & set(in_slices(held_out(9, 1), 4))


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_a_part_is_i_of_n(text):
    assert parse_part("0/4") == (0, 4)
    with pytest.raises(UserError, match=r"expected i/n, such as 0/4"):
        parse_part(text)
