"""The streaming server of semanticodec (installed as ``semanticodec_server``)."""
