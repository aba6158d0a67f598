collect_ignore_glob = ["goldens/*"]  # scripts that run in environments of their own
