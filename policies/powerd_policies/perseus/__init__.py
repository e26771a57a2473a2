"""Perseus (SOSP'24), exact: the least energy of a pipeline's iteration for any deadline, on the clocks that a GPU really has."""
