"""The pursuit as the encoder of other packages; each file imports its host when it is used."""
