#!/usr/bin/env bash
# Takes the place of ssh: runs a command here instead of on the host named first, in a terminal, as ssh -tt does.
shift
exec env --default-signal=INT,QUIT script --quiet --return --command "$*" /dev/null
