"""The beginnings of licence files, as projects have them."""

MIT = """\
MIT License

Copyright (c) 2020 Ada Lovelace

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
"""
BSD_2 = """\
Copyright 2009, The Authors. All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:
1. Redistributions of source code must retain the above copyright notice.
"""
BSD_3 = (
    BSD_2
    + """\
3. Neither the name of the copyright holder nor the names of its contributors
may be used to endorse or promote products derived from this software.
"""
)
BSD_4 = (
    BSD_3
    + """\
3. All advertising materials mentioning features or use of this software
must display the following acknowledgement:
"""
)
APACHE = """\
                                 Apache License
                           Version 2.0, January 2004
                        http://www.apache.org/licenses/

   TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION
"""
GPL = """\
                    GNU GENERAL PUBLIC LICENSE
                       Version 2, June 1991

The GNU Lesser General Public License applies to some libraries instead.
"""
LINUX = """\
The Linux Kernel is provided under:

	SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note

Being under the terms of the GNU General Public License version 2 only.
"""
DEBIAN = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: golang

Files: *
Copyright: The Go Authors
License: BSD-3-clause

Files: src/debug/*
Copyright: Others
License: GPL-2
"""
