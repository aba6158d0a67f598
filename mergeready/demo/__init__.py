"""The whole story on real weights and real text, offline, in minutes: ``mergeready demo``."""
