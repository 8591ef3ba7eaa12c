"""A process has one Ray session, and one after the other."""

from fedsim.ray_session import Session, current, session


def test_a_session_is_the_processs_own_until_it_ends():
    with session(1) as one:
        assert current() is one
        one.wait()
    assert current() is None
    again = Session(1)
    again.start()
    again.wait()  # a second Ray starts after the first has ended
    again.close()
