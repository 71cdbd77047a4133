/* SPDX-License-Identifier: GPL-2.0 */
/* What bindgen reads; rust/sys/bindgen_items names what it takes from here. */
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/fs_parser.h>
#include <linux/kobject.h>
#include <linux/kthread.h>
#include <linux/lz4.h>
#include <linux/mm.h>
#include <linux/rmap.h>
#include <linux/shrinker.h>
#include <linux/statfs.h>
#include <linux/zsmalloc.h>
#include "../helpers.h"
