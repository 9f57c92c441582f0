"""From a classroom to a trained student: session, loop, learner, and the run folder they write."""
