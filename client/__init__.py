"""The streaming client of semanticodec (installed as ``semanticodec_client``)."""
