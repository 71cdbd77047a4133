/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Where C and Rust meet. The first part faces C: inlines and macros of the kernel that Rust cannot
 * call, one line each in helpers.c. The second part faces Rust: the operation tables in helpers.c
 * point to these functions, which rust/glue implements.
 */
#ifndef THINRAM_HELPERS_H
#define THINRAM_HELPERS_H

#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/fs_parser.h>
#include <linux/mm.h>
#include <linux/statfs.h>
#include <linux/sysfs.h>
#include <linux/uio.h>

/* Bytes that LZ4 works in; the constant of lz4.h is no number to bindgen. */
#define THINRAM_LZ4_WORK 16416

/* C for Rust: pages */
struct page *thinram_page_alloc(gfp_t gfp, int nid);
struct page *thinram_page_alloc_vma(gfp_t gfp, struct vm_area_struct *vma, unsigned long addr);
extern const gfp_t thinram_gfp_guest;
extern const gfp_t thinram_gfp_guest_zeroed;
extern const gfp_t thinram_gfp_returned;
extern const gfp_t thinram_gfp_shared;
extern const gfp_t thinram_gfp_awaited;
extern const gfp_t thinram_gfp_pool;
struct page *thinram_pfn_to_page(unsigned long pfn);
unsigned long thinram_page_to_pfn(const struct page *page);
void *thinram_page_address(const struct page *page);
struct mem_cgroup *thinram_memcg_of_current(void);
void thinram_memcg_put(struct mem_cgroup *memcg);
struct mem_cgroup *thinram_memcg_charge_to(struct mem_cgroup *memcg);
int thinram_page_to_nid(const struct page *page);
void thinram_page_get(struct page *page);
void thinram_page_put(struct page *page);
int thinram_page_refcount(const struct page *page);
int thinram_page_mapcount(const struct page *page);
/* Inline where the architecture has no machine checks. Bytes that were not copied. */
unsigned long thinram_copy_mc(void *to, const void *from, unsigned int bytes);
bool thinram_page_freeze(struct page *page, int refs);
void thinram_page_unfreeze(struct page *page, int refs);
bool thinram_page_poisoned(const struct page *page);
bool thinram_page_take_referenced(struct page *page);
unsigned long thinram_page_private(const struct page *page);
void thinram_page_set_private(struct page *page, unsigned long value);
unsigned long thinram_page_note(const struct page *page);
void thinram_page_set_note(struct page *page, unsigned long value);

/* C for Rust: 2 MiB pages. Kernels without them answer NULL, false and VM_FAULT_FALLBACK. */
struct page *thinram_huge_alloc(int nid);
struct page *thinram_huge_alloc_vma(struct vm_fault *vmf);
bool thinram_huge_fits(struct vm_fault *vmf);
/* 0 nothing, 1 a 2 MiB page, 2 a table */
int thinram_huge_middle(struct vm_fault *vmf);
vm_fault_t thinram_huge_insert(struct vm_fault *vmf, struct page *page, bool write);

/* C for Rust: tables of 4 KiB entries, see rust/sys/table.rs */
bool thinram_table_can_go(const struct vm_fault *vmf);
spinlock_t *thinram_table_lock_middle(struct vm_fault *vmf);
spinlock_t *thinram_table_lock_inner(struct vm_fault *vmf, spinlock_t *middle);
void thinram_table_unlock(spinlock_t *lock);
const unsigned long *thinram_table_entries(const struct vm_fault *vmf);
struct page *thinram_table_page(const struct vm_fault *vmf);
void thinram_table_clear(struct vm_fault *vmf);
void thinram_table_flush(void);
void thinram_table_free(struct page *table);

/* C for Rust: swap files */
int thinram_find_dir(const char *name, struct path *path);
bool thinram_path_is_ours(const struct path *path);
bool thinram_path_is_memory(const struct path *path);
struct file *thinram_swap_file(const struct path *dir);
void thinram_kiocb_init(struct kiocb *kiocb, struct file *file, loff_t at);
void thinram_bvec_set(struct bio_vec *vec, void *address, unsigned int len);
unsigned int thinram_memalloc_begin(void);
void thinram_memalloc_end(unsigned int flags);
void thinram_chacha20_block(u32 *state, u8 *out);
u64 thinram_siphash(const void *data, size_t len, const u64 *key);

/* C for Rust: the rest */
bool thinram_fatal_signal_pending(void);
void thinram_cond_resched(void);
u64 thinram_thread_cpu_ns(void);
phys_addr_t thinram_virt_to_phys(const void *address);
void *thinram_phys_to_virt(phys_addr_t address);
bool thinram_is_err(unsigned long value);
unsigned long thinram_total_pages(void);
bool thinram_ratelimit(void);
void thinram_memstall_enter(unsigned long *flags);
void thinram_memstall_leave(unsigned long *flags);
struct file *thinram_vmf_file(struct vm_fault *vmf);
void thinram_file_put(struct file *file);
void thinram_file_accessed(struct file *file);
void thinram_release_fault_lock(struct vm_fault *vmf);
bool thinram_vma_shared(const struct vm_area_desc *desc);
void thinram_vma_prepare(struct vm_area_desc *desc);
bool thinram_vma_read_only(const struct vm_area_struct *vma);
struct inode *thinram_vma_inode(const struct vm_area_struct *vma);
void thinram_inode_setup_file(struct inode *inode);
void thinram_inode_setup_dir(struct inode *inode);
void thinram_inode_stamp(struct inode *inode);
void thinram_inode_lock(struct inode *inode);
void thinram_inode_unlock(struct inode *inode);
loff_t thinram_i_size_read(const struct inode *inode);
void thinram_i_size_write(struct inode *inode, loff_t size);
bool thinram_is_kernel_thread(void);
int thinram_owner_pid(void);
int thinram_register_fs(void);
void thinram_unregister_fs(void);
void thinram_sb_setup(struct super_block *sb);
void thinram_fc_setup(struct fs_context *fc, void *options);
int thinram_fs_parse(struct fs_context *fc, struct fs_parameter *param,
		     struct fs_parse_result *result);
u32 thinram_result_u32(const struct fs_parse_result *result);
bool thinram_result_bool(const struct fs_parse_result *result);
kuid_t thinram_result_uid(const struct fs_parse_result *result);
kgid_t thinram_result_gid(const struct fs_parse_result *result);
void *thinram_fc_options(const struct fs_context *fc);
struct super_block *thinram_fc_super(const struct fs_context *fc);
void thinram_fc_error(struct fs_context *fc, const char *what);
const char *thinram_param_string(const struct fs_parameter *param);
const unsigned char *thinram_dentry_name(const struct dentry *dentry);
unsigned int thinram_dentry_name_len(const struct dentry *dentry);
bool thinram_is_dir(const struct inode *inode);
bool thinram_file_read_only(const struct file *file);
struct inode *thinram_file_inode(const struct file *file);
size_t thinram_iter_count(const struct iov_iter *iter);
int thinram_finish_tmpfile(struct file *file, int error);
void thinram_statfs_set(struct kstatfs *buf, u64 blocks, u64 free);
void thinram_sb_option(struct seq_file *m, const char *name, const char *value);
struct kobject *thinram_fs_kobj(void);
int thinram_kobject_add(struct kobject *kobj, struct kobject *parent, const char *name);
struct shrinker *thinram_shrinker_register(void *data);
void thinram_account_reclaimed(unsigned long pages);

/* Rust for C: rust/glue/fs.rs */
int thinram_rs_init_fs_context(struct fs_context *fc);
void thinram_rs_free_fc(struct fs_context *fc);
int thinram_rs_parse_param(struct fs_context *fc, struct fs_parameter *param);
int thinram_rs_get_tree(struct fs_context *fc);
int thinram_rs_reconfigure(struct fs_context *fc);
void thinram_rs_kill_sb(struct super_block *sb);
int thinram_rs_statfs(struct dentry *dentry, struct kstatfs *buf);
int thinram_rs_show_options(struct seq_file *m, struct dentry *root);
void thinram_rs_evict_inode(struct inode *inode);
int thinram_rs_create(struct mnt_idmap *idmap, struct inode *dir, struct dentry *dentry,
		      umode_t mode);
struct dentry *thinram_rs_mkdir(struct mnt_idmap *idmap, struct inode *dir,
				struct dentry *dentry, umode_t mode);
int thinram_rs_tmpfile(struct mnt_idmap *idmap, struct inode *dir, struct file *file,
		       umode_t mode);
int thinram_rs_link(struct dentry *old, struct inode *dir, struct dentry *dentry);
int thinram_rs_rename(struct mnt_idmap *idmap, struct inode *old_dir, struct dentry *old_dentry,
		      struct inode *new_dir, struct dentry *new_dentry, unsigned int flags);
int thinram_rs_setattr(struct mnt_idmap *idmap, struct dentry *dentry, struct iattr *attr);
int thinram_rs_getattr(struct mnt_idmap *idmap, const struct path *path, struct kstat *stat,
		       u32 mask, unsigned int flags);

/* Rust for C: rust/glue/file.rs */
ssize_t thinram_rs_read_iter(struct kiocb *iocb, struct iov_iter *to);
ssize_t thinram_rs_write_iter(struct kiocb *iocb, struct iov_iter *from);
loff_t thinram_rs_llseek(struct file *file, loff_t offset, int whence);
long thinram_rs_fallocate(struct file *file, int mode, loff_t offset, loff_t len);
int thinram_rs_mmap_prepare(struct vm_area_desc *desc);

/* Rust for C: rust/glue/vm_ops.rs */
vm_fault_t thinram_rs_fault(struct vm_fault *vmf);
vm_fault_t thinram_rs_huge_fault(struct vm_fault *vmf, unsigned int order);
vm_fault_t thinram_rs_page_mkwrite(struct vm_fault *vmf);
void thinram_rs_open(struct vm_area_struct *vma);
void thinram_rs_close(struct vm_area_struct *vma);
int thinram_rs_mapped(unsigned long start, unsigned long end, pgoff_t pgoff,
		      const struct file *file, void **private_data);

/* Rust for C: rust/glue/shrinker.rs */
unsigned long thinram_rs_shrinker_count(void *data);
unsigned long thinram_rs_shrinker_scan(void *data, unsigned long pages);

/* Rust for C: rust/glue/sysfs.rs */
ssize_t thinram_rs_sysfs_show(struct kobject *kobj, struct attribute *attr, char *buf);
ssize_t thinram_rs_sysfs_store(struct kobject *kobj, struct attribute *attr, const char *buf,
			       size_t count);
void thinram_rs_sysfs_release(struct kobject *kobj);

#endif
